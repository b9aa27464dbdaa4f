"""What a method is: one way to train, with all that the rest of graft must know of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.base import Adapter
from graft.adapters.config import AdapterConfig
from graft.adapters.rates import low_rank_rate
from graft.formats.base import WeightFormat
from graft.formats.choice import described
from graft.formats.config import FormatConfig
from graft.formats.registry import AS_IT_IS

Config = TypeVar("Config", bound=AdapterConfig)

_NARROW = (2, 3)


def narrow_solver(bits: int | str | None) -> str:
    """Return a calibrated solver where what narrow codes lose stays lost.

    The fewer bits, the less of the rounding a grid that moves makes up for; but what qep has over
    gptq, training of 300 steps has made up for too.
    """
    return "gptq" if bits in _NARROW else "rtn"


@dataclass(frozen=True)
class Kept:
    """What an adapted layer keeps of a forward pass for its backward pass."""

    products: tuple[int, ...]
    """Values per token that each of its products with the input gives. One that is fused gives the
    output and, beside it, LoRA's A x or QA-LoRA's group sums."""
    keeps_input: bool = True
    per_token: int = 0
    """Values beside input and output for each token, in the compute dtype."""
    constant_bytes: int = 0
    """Bytes whatever the batch."""


class Method:
    """One way to train. An entry overrides what is not so for it; the registry holds instances."""

    name: ClassVar[str]
    on_quantised: ClassVar[str | None] = None
    """What it is called where a run quantises what it trains on; None: as ever."""
    adapter: ClassVar[type[Adapter] | None] = None
    """What it attaches to each layer; None: it trains the weights themselves."""
    low_rank: ClassVar[bool] = False
    """Whether that has factors A [rank, in_features] and B [out_features, rank], which `--init` can
    draw."""
    adds_low_rank: ClassVar[bool] = False
    """Whether B A is an update beside the weight, a part of which `--init` can move there."""
    takes: ClassVar[frozenset[str]] = frozenset()
    """The options of `AdapterConfig` that mean something to it."""
    whys: ClassVar[Mapping[str, str]] = {}
    """For some of them, why other methods do not take them."""

    # The weights that it trains on
    default_format: ClassVar[str] = AS_IT_IS
    double_quant: ClassVar[bool] = False
    """Whether the constants of its codebook weights are quantised by default."""
    formats: ClassVar[tuple[str, ...] | None] = None
    """What `--format` may say; None: anything."""
    rounds_itself: ClassVar[bool] = False
    """Whether it needs the unquantised weights beside the rounded ones."""

    # What it deploys
    merges_exactly: ClassVar[bool] = False
    """Whether the update is absorbed by the quantised weight, so that a merge loses nothing."""
    deploys_into_original: ClassVar[bool] = False
    """Whether its dense merge is into the base before that was quantised."""

    @property
    def trains_adapter(self) -> bool:
        """Whether it trains something beside the weights."""
        return self.adapter is not None

    @property
    def quantises_base(self) -> bool:
        """Whether it quantises what it trains on, with no format asked for."""
        return self.default_format != AS_IT_IS

    # Words --------------------------------------------------------------------------------------

    def title(self, config: AdapterConfig) -> str:
        """Return the method in words, as a report's title has it."""
        return config.method

    def card_rows(self, config: AdapterConfig) -> dict[str, object]:
        """Return what a model card tells of its settings, beside those of every method."""
        return {"rank": config.rank, "rank of the moves of the grid": config.grid_rank or None}

    # Its options ----------------------------------------------------------------------------------

    def resolved(self, config: Config, bits: int | None) -> Config:
        """Return the configuration with the defaults on codes of `bits` filled in."""
        return dataclasses.replace(config, rank=config.update_rank)

    def problems(self, config: AdapterConfig) -> list[str]:
        """Return which of its options contradict each other."""
        return []

    # The weights that it trains on ----------------------------------------------------------------

    def format_problem(self, name: str) -> str | None:
        """Return why it cannot train on weights of `--format name`, or None."""
        if self.formats is None or name in self.formats:
            return None
        return (
            f"method {self.name} trains on weights in the {self.formats[0]} format, not {name}. "
            "Drop --format, or train with qlora"
        )

    def weight_format(self, settings: FormatConfig, float32: bool) -> dict[str, Any] | None:
        """Return {'format': ..., options} of what it trains on; None: the weights as they are.

        float32: the weights are computed with as float32. Raises GraftError with every setting
        that does not fit.
        """
        name = settings.format or self.default_format
        problem = self.format_problem(name)
        return described(
            settings,
            name,
            double_quant=self.double_quant,
            float32=float32,
            problems=[] if problem is None else [problem],
        )

    def grid_problems(self, config: AdapterConfig, weight_format: WeightFormat) -> list[str]:
        """Return which options ask something of the weights that their format has not."""
        return []

    def default_solver(self, bits: int | str | None) -> str:
        """Return the solver that rounds its base: to nearest, where training makes up for it."""
        return "rtn"

    def compute_dtype(self, dtype: str) -> str:
        """Return the --dtype that it computes in."""
        return dtype

    # Training -------------------------------------------------------------------------------------

    def make_trainable(
        self,
        model: nn.Module,
        targets: Sequence[str],
        config: AdapterConfig,
        ranks: Mapping[str, int] | None = None,
    ) -> dict[str, nn.Parameter]:
        """Let the frozen target layers of a model train; return what trains, by name.

        targets: the layers that are adapted; the parameters, for a method without an adapter.
        ranks: see `attach_adapter`.
        """
        attach_adapter(model, targets, config, ranks=ranks)
        return adapter_parameters(model, "default")

    def dense_steps(self, config: AdapterConfig, steps: int) -> int:
        """Return how many of the steps train before the weights are rounded."""
        return 0

    def rounds_in_training(self, config: AdapterConfig) -> bool:
        """Return whether the weights are rounded between two steps, and not before the first."""
        return False

    def training_format(self, weight_format: WeightFormat, dense_steps: int) -> WeightFormat:
        """Return the format of the base at the first step."""
        return weight_format

    def learning_rate(self, config: AdapterConfig, hidden_size: int) -> float:
        """Return the default peak learning rate of AdamW."""
        return low_rank_rate(config, hidden_size)

    def rate_factors(
        self, config: AdapterConfig, hidden_size: int, bits: Mapping[str, int]
    ) -> dict[str, float]:
        """Return by what the learning rate is multiplied for some of the parameters.

        bits: the parameters' names, each with the width of its layer's codes.
        """
        return {}

    # The plan -------------------------------------------------------------------------------------

    def kept(self, layer: AdaptedLinear, config: AdapterConfig, dtype: torch.dtype) -> Kept:
        """Return what an adapted layer keeps for the backward pass."""
        return Kept((layer.base.out_features,))

    # Files ----------------------------------------------------------------------------------------

    def reads(self, own: str | None, peft: Mapping[str, Any]) -> bool:
        """Return whether an adapter's files are its own.

        own: what `graft_adapter.json` calls the method, or None without that file; peft: PEFT's
        configuration, empty without one.
        """
        return self.adapter is not None and own == self.adapter.method

    def unsaid(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return what settings mean by options that they do not name, being older than those."""
        return {}

    def peft_problem(self, config: AdapterConfig) -> str | None:
        """Return why PEFT cannot hold what it trains, or None."""
        return f"PEFT has no {self.name} adapter"
