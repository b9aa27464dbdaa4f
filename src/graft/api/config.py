"""The configuration of each command, put together from those of the components."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from graft.adapters.config import AdapterConfig
from graft.calibrate.config import SolverConfig
from graft.data.config import DataConfig, ReadingConfig
from graft.export.config import ExportTarget
from graft.formats.config import FormatConfig
from graft.layers.config import ActivationConfig
from graft.model.config import ModelConfig
from graft.objectives.config import ObjectiveConfig
from graft.optimizers.registry import DEFAULT_OPTIMIZER, OPTIMIZERS
from graft.train.config import LoopConfig

AdoptedFormat = Literal["nf4", "fp4", "int8"]
"""What an adapter that PEFT trained may have had its base in: the formats of bitsandbytes."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    LoopConfig, DataConfig, AdapterConfig, SolverConfig, FormatConfig, ActivationConfig, ModelConfig
):
    """A training run."""

    GROUP: ClassVar[str] = "output"

    export: tuple[ExportTarget, ...] = ()
    """Exports to write into the run's folder at the end; whether they can be written is checked
    before training starts."""


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(ReadingConfig, SolverConfig, FormatConfig, ModelConfig):
    """A quantisation without training."""

    GROUP: ClassVar[str] = "quantisation"
    RARE: ClassVar[frozenset[str]] = frozenset({"calibration_length"})

    out: str
    """Folder to write the quantised model to."""
    data: str | None = None
    """File of examples whose text calibrates the gptq and qep solvers."""
    targets: tuple[str, ...] = ()
    """Layers to quantise: names, suffixes, or regular expressions; none means every linear layer
    but the output head."""
    calibration_length: int = 512
    """Most tokens of a calibration row."""


@dataclass(frozen=True, kw_only=True)
class CompressConfig(ReadingConfig, SolverConfig, FormatConfig, ModelConfig):
    """A compression into low-rank factors, at one size or several."""

    GROUP: ClassVar[str] = "compression"
    RARE: ClassVar[frozenset[str]] = frozenset({"calibration_length", "eval_rows"})

    out: str
    """Folder to write the compressed model to; of several, a folder for each and their curve."""
    ratio: tuple[float, ...] = ()
    """Share of its weights (with --bits of its bytes) that each matrix keeps, as 0.5; several give
    a curve."""
    energy: tuple[float, ...] = ()
    """Instead: share of the squared singular values that each matrix keeps, as 0.95."""
    rank: tuple[int, ...] = ()
    """Instead: the rank of every matrix."""
    targets: tuple[str, ...] = ()
    """Layers to factor: names, suffixes, or regular expressions; none means every linear layer but
    the output head."""
    data: str | None = None
    """File of examples: factors are then the best for the inputs that its text gives each layer;
    without it they are the plain SVD of the weights. It calibrates solvers too."""
    eval_data: str | None = None
    """File whose text the perplexity is measured on; by default rows of --data behind those that
    calibrate."""
    eval_rows: int = 128
    """Most rows that the perplexity is measured on."""
    calibration_length: int = 512
    """Most tokens of a row."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(
    AdapterConfig, FormatConfig, ActivationConfig, SolverConfig, ObjectiveConfig, ModelConfig
):
    """A prediction of memory."""

    GROUP: ClassVar[str] = "plan"

    batch_size: int = 16
    """Rows that are computed at once."""
    max_length: int = 512
    """Tokens in a row."""
    checkpointing: Literal["auto", "none", "products", "half", "layers"] = "auto"
    """What each decoder layer keeps for the backward pass: everything (none), its input and its
    matrix products (products), most of those (half), or little more than its input (layers). auto
    takes the first of them whose planned peak fits into 80 % of the memory that is free now."""
    optimizer: Annotated[str, OPTIMIZERS] = DEFAULT_OPTIMIZER
    """Whose states take memory too."""
    json: bool = False
    """Print one JSON object instead of a table."""


def as_plain(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values, as they are written to YAML; no trust is written."""
    plain = dataclasses.asdict(config)
    plain.pop("trust_remote_code", None)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}
