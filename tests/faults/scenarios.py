"""The commands that faults are tried on, each with an uninterrupted run to compare with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from faults import inputs
from faults.outcomes import Contents, contents, normal
from faults.record import Operation, read_record
from faults.shim import Action, Fault
from faults.warm import Outcome, Warm

STEPS = 6
_TRAIN = ["--steps", STEPS, "--batch-size", 2, "--max-length", 32, "--checkpointing", "none"]
_TRAIN += ["--eval-every", 1]
_LORA = ("--method", "lora", "--rank", 4)
TRAININGS: dict[str, tuple[object, ...]] = {
    "lora with dropout": (*_LORA, "--dropout", 0.1),
    "lora that gets worse": (*_LORA, "--learning-rate", 0.3),
    "qalora": ("--method", "qalora"),
    "merge_aware that rounds between steps": ("--method", "merge_aware", "--bits", 2),
    "merge_aware that rounds at the start": ("--method", "merge_aware", "--dense-fraction", 0),
    "lora with DoRA": (*_LORA, "--dora"),
}
"""Flags of the methods that are trained; the second rounds its weights in the middle."""


@dataclass(frozen=True)
class Scenario:
    """A command, which writes into the box."""

    name: str
    words: tuple[object, ...]
    trains: bool = False
    """Whether --resume may go on with it."""

    @property
    def resuming(self) -> tuple[object, ...]:
        """The same call, with --resume where there is such a flag."""
        return (*self.words, "--resume") if self.trains else self.words


@dataclass(frozen=True)
class Reference:
    """What a scenario leaves when nothing goes wrong."""

    contents: Contents
    operations: int
    record: Sequence[Operation]
    seconds: float


class Bench:
    """A warm process, a box that commands write into, and what they read, made when it is needed.

    A context manager. The box is always the same folder, as paths are part of what is written.
    """

    def __init__(self, work: Path) -> None:
        work = work.resolve()
        self.work, self.files = work, work / "files"
        self.box, self.inputs = self.files / "box", self.files / "inputs"
        shutil.rmtree(work, ignore_errors=True)
        self.inputs.mkdir(parents=True)
        self.box.mkdir()
        self.warm = Warm(work)
        self._references: dict[tuple[object, ...], Reference] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.warm.close()

    # What the commands read ---------------------------------------------------------------------

    @cached_property
    def base(self) -> Path:
        return inputs.write_base(self.inputs / "base")

    @cached_property
    def rows(self) -> Path:
        return inputs.write_rows(self.inputs / "rows.jsonl")

    @cached_property
    def pickled(self) -> Path:
        return inputs.write_pickled(self.base, self.inputs / "pickled")

    def _made(self, name: str, *words: object) -> Path:
        path = self.inputs / name
        outcome = self.warm.run([*words, "--out", path])
        if outcome.status != 0:
            raise RuntimeError(f"graft {words[0]}: {outcome.output}")
        return path

    @cached_property
    def qalora_run(self) -> Path:
        return self._made("qalora", *self._train("qalora"))

    @cached_property
    def lora_run(self) -> Path:
        return self._made("lora", *self._train("lora with dropout"))

    @cached_property
    def peft_adapter(self) -> Path:
        return self._made("adapter", "export", self.lora_run, "--to", "peft")

    @cached_property
    def gguf_file(self) -> Path:
        return self._made("model.gguf", "export", self.qalora_run, "--to", "gguf")

    # Scenarios ------------------------------------------------------------------------------------

    def _train(self, name: str) -> list[object]:
        flags = [*_TRAIN, *TRAININGS[name]]
        return ["train", "--model", self.base, "--data", self.rows, *flags]

    def training(self, name: str, save_every: int | None = 2) -> Scenario:
        """Return one of TRAININGS; save_every None is the command's own default."""
        words = [*self._train(name), "--out", self.box / "run"]
        if save_every is not None:
            words += ["--save-every", save_every]
        return Scenario(f"train {name}", tuple(words), trains=True)

    def trainings(self) -> list[Scenario]:
        return [self.training(name) for name in TRAININGS]

    def commands(self) -> list[Scenario]:
        """Return all commands that write something, but train."""
        made: dict[str, Callable[[], list[object]]] = {
            "quantize": lambda: ["quantize", "--model", self.base, "--format", "int"],
            "merge qalora": lambda: ["merge", self.qalora_run],
            "merge lora": lambda: ["merge", self.lora_run],
            "convert pickled": lambda: ["convert", self.pickled],
            "convert gguf": lambda: ["convert", self.gguf_file, "--tokenizer", self.base],
            "adopt": lambda: ["adopt", self.peft_adapter, "--model", self.base],
            "export peft": lambda: ["export", self.lora_run, "--to", "peft"],
            "compare": lambda: [
                *("compare", "--model", self.base, "--data", self.rows, *_TRAIN),
                *("--contenders", "base", "lora", "lora+rtn", "qalora", "--save-every", 2),
            ],
        }
        for target, needs in _TARGETS.items():
            if needs is None or find_spec(needs):
                made[f"export {target}"] = lambda target=target: [
                    *("export", self.qalora_run, "--to", target)
                ]
        return [
            Scenario(name, (*words(), "--out", self.box / _OUT.get(name, "out")))
            for name, words in made.items()
        ]

    def scenario(self, name: str) -> Scenario:
        """Return a scenario by its name."""
        if name.removeprefix("train ") in TRAININGS:
            return self.training(name.removeprefix("train "))
        return next(found for found in self.commands() if found.name == name)

    # Running ------------------------------------------------------------------------------------

    def empty(self) -> None:
        """Empty the box, which stays the same folder: the record knows it by its inode."""
        for path in self.box.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def run(self, words: Sequence[object], action: Action | None = None, **fault: int) -> Outcome:
        """Run a command, with a fault that befalls it where one is given."""
        if action is None:
            return self.warm.run(words)
        # Without descriptors nothing can be opened to read either.
        folder = self.files if action == Action.FAIL else self.box
        return self.warm.run(words, Fault(str(folder), action, **fault))

    def reference(self, scenario: Scenario) -> Reference:
        """Run it twice without a fault; what differs between the two is not compared after."""
        if scenario.words not in self._references:
            first = self._whole_run(scenario)
            second = self._whole_run(scenario)
            reference = Reference(
                normal(first.contents, second.contents),
                second.operations,
                second.record,
                second.seconds,
            )
            self._references[scenario.words] = reference
        return self._references[scenario.words]

    def _whole_run(self, scenario: Scenario) -> Reference:
        self.empty()
        log = self.work / "record"
        outcome = self.warm.run(scenario.words, Fault(str(self.box), Action.RECORD, log=str(log)))
        if outcome.status != 0:
            raise RuntimeError(f"{scenario.name}: {outcome.output}")
        found = contents(self.box)
        return Reference(found, outcome.operations, read_record(log), outcome.seconds)


_TARGETS = {"gguf": None, "hf": None, "mlx": None, "ollama": None, "onnx": "onnx"} | {
    "openvino": "openvino"
}
"""Export targets, by what they need installed."""
_OUT = {"export gguf": "out.gguf"}
