"""What competes: from the words on the command line to trainings and deployed models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from graft.adapters.registry import METHODS
from graft.api.config import TrainConfig
from graft.calibrate.registry import SOLVERS
from graft.comparison.config import CompareConfig
from graft.data.config import DataConfig
from graft.errors import did_you_mean, raise_problems
from graft.formats.config import WIDTHS

BASE = "base"
"""The contender that nothing has trained."""
YARDSTICK = "lora"
"""The contender whose perplexity the others' are divided by."""
_WORD = re.compile(r"(?P<method>[^@+]+)(@(?P<base_solver>[^@+]*))?(\+(?P<solver>[^@+]*))?")


@dataclass(frozen=True)
class Contender:
    """A way to train and to deploy."""

    method: str
    """'base' for none, or a method of `graft train`."""
    base_solver: str | None = None
    """Quantises the weights that are trained on; None is the method's default."""
    solver: str | None = None
    """Quantises the dense merge; None deploys what the merge gives."""

    @property
    def name(self) -> str:
        """The word for it, as in --contenders."""
        deployed = "" if self.solver is None else f"+{self.solver}"
        return f"{self.trained}{deployed}"

    @property
    def trained(self) -> str:
        """The word for its training, which contenders share."""
        return self.method if self.base_solver is None else f"{self.method}@{self.base_solver}"

    @property
    def is_trained(self) -> bool:
        """Whether it is more than the base model."""
        return self.method != BASE

    @property
    def trains_on_integers(self) -> bool:
        """Whether each width is a training of its own."""
        return self.is_trained and METHODS[self.method].merges_exactly

    @property
    def has_bits(self) -> bool:
        """Whether what it deploys has a width."""
        return self.trains_on_integers or self.solver is not None

    @property
    def merges_into(self) -> Literal["trained", "original"]:
        """Which weights `graft merge` puts its update into."""
        return "original" if METHODS[self.method].deploys_into_original else "trained"


@dataclass(frozen=True)
class Training:
    """One run of `graft train`."""

    contender: Contender
    """Any of those that deploy it; only the method and the solver of the base are heeded."""
    bits: int | None
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return _joined(self.contender.trained, self.bits, self.seed)

    def config(self, config: CompareConfig, out: str) -> TrainConfig:
        """Return the settings of the run in the folder `out`."""
        method = self.contender.method
        data = {one.name: getattr(config, one.name) for one in fields(DataConfig)}
        return TrainConfig(
            model=config.model,
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            **data,
            method=method,
            rank=config.rank,
            alpha=config.alpha,
            targets=config.targets,
            bits=self.bits,
            group_size=None if self.bits is None else config.group_size,
            solver=self.contender.base_solver,
            calibration_rows=config.calibration_rows,
            damping=config.damping,
            steps=config.steps,
            epochs=config.epochs,
            batch_size=config.batch_size,
            grad_accum=config.grad_accum,
            learning_rate=learning_rates(config.learning_rates).get(method),
            checkpointing=config.checkpointing,
            eval_every=config.eval_every,
            save_every=config.save_every,
            seed=self.seed,
            out=out,
        )


@dataclass(frozen=True)
class Entry:
    """One deployed model."""

    contender: Contender
    bits: int | None
    seed: int | None
    """None for an untrained model, which depends on no seed."""

    @property
    def name(self) -> str:
        """Name of its files."""
        return _joined(self.contender.name, self.bits, self.seed)

    @property
    def label(self) -> str:
        """Its name in words."""
        return entry_label(self.contender.name, self.bits, self.seed)

    @property
    def training(self) -> Training | None:
        """The run that it deploys; None for an untrained model."""
        if self.seed is None:
            return None
        bits = self.bits if self.contender.trains_on_integers else None
        contender = Contender(self.contender.method, self.contender.base_solver)
        return Training(contender, bits, self.seed)


def parse_contenders(words: Iterable[str]) -> list[Contender]:
    """Return the contenders that the words name, each once.

    Raises GraftError with every word that names none.
    """
    problems: list[str] = []
    contenders: dict[Contender, None] = {}
    for word in words:
        match = _WORD.fullmatch(word)
        if match is None:
            problems.append(f"--contenders {word}: expected METHOD[@SOLVER][+SOLVER]")
            continue
        found = _problems(**match.groupdict())
        problems += [f"--contenders {word}: {problem}" for problem in found]
        if not found:
            method, base_solver, solver = match.group("method", "base_solver", "solver")
            if base_solver is not None and _is_default(method, base_solver):
                base_solver = None
            contenders[Contender(method, base_solver, solver)] = None
    if not contenders and not problems:
        problems.append("--contenders names none; give one at least, such as qalora")
    raise_problems(problems, "contenders")
    return list(contenders)


def _is_default(method: str, solver: str) -> bool:
    """Return whether a method's base is rounded by that solver at every width."""
    return all(solver == METHODS[method].default_solver(bits) for bits in WIDTHS)


def _problems(method: str, base_solver: str | None, solver: str | None) -> list[str]:
    if method != BASE and method not in METHODS:
        return [f"unknown method {method!r}{did_you_mean(method, (BASE, *METHODS))}"]
    problems = [
        problem
        for name in (base_solver, solver)
        if name is not None and (problem := SOLVERS.problem(name))
    ]
    quantises_base = method != BASE and METHODS[method].quantises_base
    if base_solver is not None and not quantises_base:
        problems.append(f"{method} quantises nothing before training; drop @{base_solver}")
    if solver is not None and Contender(method).trains_on_integers:
        problems.append(
            f"{method} merges exactly into the integers that it trained on, and quantising those "
            f"again would only lose; drop +{solver}, or quantise the base by it: "
            f"{method}@{solver}"
        )
    return problems


def learning_rates(words: Iterable[str]) -> dict[str, float]:
    """Return the rate of each method that a METHOD=RATE names; raises GraftError with bad ones."""
    problems, rates = [], {}
    for word in words:
        method, _, number = word.partition("=")
        try:
            rates[method] = float(number)
        except ValueError:
            problems.append(f"--learning-rates {word}: expected METHOD=RATE, such as lora=1e-3")
            continue
        if method not in METHODS:
            known = did_you_mean(method, METHODS)
            problems.append(f"--learning-rates {word}: unknown method {method!r}{known}")
        if not 0 < rates[method] < float("inf"):
            problems.append(f"--learning-rates {word}: expected a rate above 0")
    raise_problems(problems, "learning rates")
    return rates


def entries(contenders: Sequence[Contender], bits: Sequence[int], seeds: int) -> list[Entry]:
    """Return every model to deploy: contenders in order, their widths in order, seeds last."""
    return [
        Entry(contender, width, seed)
        for contender in contenders
        for width in (dict.fromkeys(bits) if contender.has_bits else (None,))
        for seed in (range(seeds) if contender.is_trained else (None,))
    ]


def trainings(wanted: Iterable[Entry]) -> list[Training]:
    """Return each training that the entries need, once, in their order."""
    needed = (entry.training for entry in wanted)
    return list(dict.fromkeys(training for training in needed if training is not None))


def entry_label(contender: str, bits: int | None, seed: int | None = None) -> str:
    """Return the name of a deployed model in words; without a seed, of all its seeds."""
    width = "" if bits is None else f", {bits} bits"
    return contender + width + ("" if seed is None else f", seed {seed}")


def _joined(word: str, bits: int | None, seed: int | None) -> str:
    parts = [word, None if bits is None else f"{bits}bit", None if seed is None else f"seed{seed}"]
    return "-".join(part for part in parts if part is not None)
