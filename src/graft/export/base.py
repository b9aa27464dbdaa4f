"""What an export target says of itself: all that training, export, card and `verify` ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from graft.adapters.config import AdapterConfig, Init
from graft.data.shapes.registry import PLAIN
from graft.errors import GraftError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from graft.export.runtimes import Runtime
    from graft.formats.base import WeightFormat
    from graft.model.load import LoadedModel

CARD = "README.md"
"""The model card in a folder; that of a single file lies beside it, see `Target.card_path`."""
FACTORED_BASE = (
    "the base is compressed into low-rank factors, which no other program loads, and the adapter "
    "is theirs; export the whole model (--to hf)"
)
"""Why an adapter is not exported by itself."""
OnTensor = Callable[[int, int], None]
"""Called after each tensor with (tensors written, all tensors)."""


@dataclass(frozen=True)
class Origin:
    """What is known of the training behind a model, as far as a target may need it."""

    kind: str = PLAIN
    """Of the rows that it was trained on."""
    separator: str = "\n"
    """Between the prompt and the answer of such a row."""
    init: Init = "default"
    """What its adapter says of its start: one that belongs on its own base is named."""
    name: str = ""
    """Of the model that was trained, or is exported as it is; empty where nobody knows it."""
    base: str | None = None
    """The base that it was trained on, by its hub id, else as it was given."""
    base_changes: str | None = None
    """In what a run's base differs from that, in words; None: in nothing but its rounding."""


class RuntimePackage(NamedTuple):
    """The program that runs what was exported."""

    module: str
    """What Python imports."""
    install: str
    """What pip is told to install."""


class Usage(NamedTuple):
    """How a card says to run what was exported."""

    words: str
    language: str
    """Of the commands, for the block that they stand in; empty for a shell's."""
    commands: str


class Target(ABC):
    """A program, or a kind of folder that programs read, which models are exported to.

    An entry is made without arguments; its attributes are those of its class.
    """

    name: str
    """In the table, after `--to`, and in a certificate."""
    suffix: str = ""
    """Of the file that is written, as '.gguf'; empty: it is a folder."""
    stage: str = "writing tensors"
    """What is shown while tensors are written."""
    package: str | None = None
    """What must be installed to write it: the extra of that name installs it."""
    widths: tuple[int, ...] = (2, 3, 4, 8)
    """Widths of the int format that it holds; --bits auto gives it no others."""
    takes_adapter: bool = False
    """It holds the adapter by itself; into any other target the model goes merged."""
    holds_new_biases: bool = True
    """It has a place for the bias that an adapter trained for a layer that has none."""
    requantizes: bool = True
    """What a merge leaves unquantised may be rounded to integers, where that is asked for."""
    keeps_tokenizer: bool = True
    """The tokenizer's files go along as they are, tokens without an embedding too."""
    library: str | None = None
    """library_name on the card, as the hub knows it; None: the target's name."""
    tagged: bool = True
    """The card's tags name it."""
    notes_on_card: bool = True
    """What `write` tells goes on the card too, as it names nothing of the exporting machine."""
    runtime: RuntimePackage | None = None
    """What `start` starts; None: nothing runs it by itself."""

    @property
    def default_name(self) -> str:
        """The name of the file or folder in a run's export folder."""
        return f"model{self.suffix}" if self.suffix else self.name

    def card_path(self, exported: Path) -> Path:
        """Return where the card of what was exported lies: in the folder, or beside the file."""
        return exported.with_name(exported.name + ".md") if self.suffix else exported / CARD

    def problems(self, config: PretrainedConfig, weight_format: WeightFormat) -> list[str]:
        """Return every reason why a model in that format cannot be exported, before it exists."""
        return []

    def without_bias(self, config: PretrainedConfig, layers: Sequence[str]) -> list[str]:
        """Return those of the layers, by name, for whose new bias it has no place."""
        return [] if self.holds_new_biases else list(layers)

    def adapter_problems(self, config: AdapterConfig) -> list[str]:
        """Return every reason why the adapter that a run is to train cannot be exported to it."""
        return []

    def prompt_problems(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        kind: str | None,
        separator: str,
    ) -> list[str]:
        """Return every reason why the tokenizer or its chat template cannot be exported.

        kind: of the training rows, or None where they could not be read.
        """
        return []

    @abstractmethod
    def write(
        self, loaded: LoadedModel, path: Path, origin: Origin, on_tensor: OnTensor
    ) -> tuple[str, ...]:
        """Write a merged model, or with `takes_adapter` one that carries its adapter.

        Returns what is worth telling, in words. What is written appears under its name only when it
        is complete, and equal models give equal bytes. Raises GraftError, with every reason, before
        anything is written.
        """

    @abstractmethod
    def usage(self, file: str, base: str | None) -> Usage:
        """Return how to run a file or folder of that name; base: the hub's name of its base."""

    def matches(self, path: Path) -> bool:
        """Return whether `path` was exported to this target, or to one that it is a case of."""
        return False

    def optional_files(self) -> Mapping[str, str]:
        """Return the files that cannot be written on this machine, and why; see `verify`."""
        return {}

    def rounds_activations(self, loaded: LoadedModel) -> bool:
        """Return whether its runtime computes a model's activations in fewer digits than float32's.

        `verify` then bounds the change of the perplexity instead of that of each logit.
        """
        return False

    def start(self, path: Path, tokens: int) -> Runtime:
        """Load what was exported in its runtime, for texts of so many tokens at most.

        Raises GraftError when the runtime is not installed or does not take the file.
        """
        if self.runtime is None:
            raise GraftError(f"{path}: nothing runs what is exported to {self.name} by itself")
        if find_spec(self.runtime.module) is None:
            raise GraftError(
                f"{self.name} files run in {self.runtime.module}, which is not installed: "
                f"pip install {self.runtime.install}"
            )
        return self.load(path, tokens)

    def load(self, path: Path, tokens: int) -> Runtime:
        """Do what `start` does, where the runtime is installed."""
        raise NotImplementedError
