"""The memory that a run will need, from config.json alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from graft.adapters.config import AdapterConfig
from graft.adapters.registry import method_of
from graft.errors import raise_problems
from graft.formats.base import WeightFormat
from graft.model.imports import is_lean
from graft.model.running.checkpointing import CHECKPOINTING, Checkpointing, check_checkpointing
from graft.model.running.memory import free_bytes
from graft.model.subject import Subject
from graft.model.trained import of_total
from graft.optimizers.base import OptimizerKind
from graft.optimizers.registry import DEFAULT_OPTIMIZER, OPTIMIZERS
from graft.plan.activations import Activations, plan_activations
from graft.plan.passing import (
    buffer_bytes,
    divergence_bytes,
    loss_bytes,
    merging_bytes,
    rounding_bytes,
    workspace_bytes,
)
from graft.plan.skeleton import PlannedModel, WeightCounts, plan_frozen, plan_model

PROCESS_BYTES = 450 * 2**20
COMMAND_BYTES = 340 * 2**20
"""What Python holds beside the model when the weights are about to be read, on Linux (x86-64, torch
2.13 for the CPU, transformers 5.23): where graft is a library, and in a process of its commands."""

HEAP_BYTES = 40 * 2**20
HEAP_BUFFERS = 5
HEAP_SHARE = 0.15
"""What the C library's heap holds beyond the tensors, in gaps that freed ones left and kept for the
next (`reuse_freed_memory`): a constant, a number of times the buffers of the layer at work, and a
share of the activations; the constant alone where large buffers go back to the system. Found by
benchmarks/plan.py, which says how well it fits."""

HEAP_UNEVEN = 30 * 2**20
"""The same of packed rows, whose batches all differ in size."""

USABLE_MEMORY = 0.8
"""Share of the memory that is free which `checkpointing` "auto" plans to use."""


@dataclass(frozen=True)
class MemoryRow:
    """One use of memory."""

    name: str
    bytes: int
    note: str


@dataclass(frozen=True)
class MemoryPlan:
    """Where the memory of a run goes, and its peaks, in bytes.

    What is counted are tensors and, on a CPU, the process and the gaps in its heap. The data come
    on top.
    """

    rows: tuple[MemoryRow, ...]
    training_bytes: int
    """Peak of training."""
    evaluation_bytes: int
    """Peak of an evaluation between training steps."""
    saving_bytes: int
    """Peak of merging the adapter and saving the model, which is a process of its own."""
    weight_file_bytes: int
    """Tensors in the file that `save_model` writes of the base: its size without the header."""
    bits_per_weight: float | None
    """Of the quantised layers, constants included; None when there are none."""
    trainable_parameters: int
    total_parameters: int
    """Of the model (tied weights once) and the adapter; a quantised weight counts as one."""
    device: str
    dtype: str
    """The dtype that the model computes in."""
    checkpointing: Checkpointing
    checkpointing_reason: str
    """Why 'auto' picked it, in words; that it was asked for, if it was."""
    left_out: str | None = None
    """What stays as it is besides embeddings, head and norms, in words; None where nothing does."""

    @property
    def peak_bytes(self) -> int:
        """The peak of a training run, its evaluations included."""
        return max(self.training_bytes, self.evaluation_bytes)

    def table(self) -> list[tuple[str, str, str]]:
        """Return (what, size, note) per row, the peaks last, for a reader's eyes."""
        peaks = (
            MemoryRow("peak of training", self.training_bytes, "of tensors; malloc may hold more"),
            MemoryRow("peak of evaluation", self.evaluation_bytes, "the optimizer's states stay"),
            MemoryRow("peak of merging and saving", self.saving_bytes, "one layer at a time"),
            MemoryRow("weights on disk", self.weight_file_bytes, "tensors of the base's file"),
        )
        return [(row.name, format_bytes(row.bytes), row.note) for row in (*self.rows, *peaks)]

    def as_dict(self) -> dict[str, Any]:
        """Return every figure by name, as plain JSON values."""
        return {**asdict(self), "peak_bytes": self.peak_bytes}


def format_bytes(count: int) -> str:
    """Return a size for a reader's eyes, such as '3.7 GiB'."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):,.1f} {unit}"
    return f"{count} B"


def plan_memory(
    model: str | Path | Subject,
    *,
    weight_format: WeightFormat | None,
    adapter: AdapterConfig,
    dtype: str,
    device: str,
    batch_size: int,
    sequence_length: int,
    checkpointing: Checkpointing | Literal["auto"],
    optimizer: str = DEFAULT_OPTIMIZER,
    calibration_rows: int = 0,
    looking_rows: int = 0,
    tokens: int | None = None,
    teacher: Subject | None = None,
    teacher_format: WeightFormat | None = None,
    trust_remote_code: bool = False,
) -> MemoryPlan:
    """Return the memory plan of a training run on a model folder, hub id or subject.

    The modules that training uses are built on the meta device, and their tensors counted; no
    weights are read. With weight_format None the targets stay as they are (dense, or as the folder
    has them quantised). A method without an adapter trains them, with gradients and the optimizer's
    states in their own dtype. sequence_length: the longest row's, in tokens. tokens: the most that
    are trained at once, where rows are packed; an evaluation pads. calibration_rows: how
    many rows the codes are calibrated on, before training or between two steps; 0 for a solver that
    needs none. looking_rows: on how many a start looks at the base as it trains. teacher: a frozen
    model beside it, and its format. A GPU's plan counts its memory alone.

    checkpointing 'auto' gives the plan of the first of none, products, half and layers whose peak
    of training fits into 80 % of the memory that is free now, and of layers when none does.

    Raises GraftError when the model, the targets and the method do not fit together.
    """
    given = {"batch size": batch_size, "sequence length": sequence_length}
    problems = [f"{name} is {n}; expected at least 1" for name, n in given.items() if n < 1]
    raise_problems(problems, "memory plan")
    planned = plan_model(
        model,
        weight_format=weight_format,
        adapter=adapter,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    check_checkpointing(planned.model, checkpointing)
    padded = batch_size * sequence_length
    shape = _Shape(batch_size, sequence_length, tokens or padded, calibration_rows, looking_rows)
    taught_by = None if teacher is None else plan_frozen(teacher, teacher_format, dtype, device)
    plan_choice = partial(_plan, planned, adapter, shape, OPTIMIZERS[optimizer], taught_by)
    if checkpointing != "auto":
        return plan_choice(checkpointing)
    plans = [plan_choice(choice) for choice in CHECKPOINTING]
    if not planned.model.supports_gradient_checkpointing:
        reason = f"none: {type(planned.model).__name__} cannot recompute its layers"
        return replace(plans[0], checkpointing_reason=reason)
    return _pick(plans, free_bytes(planned.device))


def process_bytes() -> int:
    """Return what a process that is like this one holds beside the model, on a CPU."""
    return COMMAND_BYTES if is_lean() else PROCESS_BYTES


def _pick(plans: list[MemoryPlan], free: int | None) -> MemoryPlan:
    """Return the first plan whose peak of training fits into the free memory, else the last."""
    usable = 0 if free is None else USABLE_MEMORY * free
    # Where none fits, and rounding is the peak of several, the quickest of the smallest.
    smallest = min(plans, key=lambda plan: plan.training_bytes)
    picked = next((plan for plan in plans if plan.training_bytes <= usable), smallest)
    reason = f"{picked.checkpointing}, whose planned peak is {format_bytes(picked.training_bytes)}"
    if free is None:
        reason += f": how much memory is free on that {picked.device} is not known here"
    elif picked.training_bytes <= usable:
        names = ", ".join(plan.checkpointing for plan in plans)
        reason += f": the first of {names} that fits into {_share(free)}"
    else:
        reason += f": more than {_share(free)}, and no choice needs less"
    return replace(picked, checkpointing_reason=reason)


def _share(free: int) -> str:
    return f"{USABLE_MEMORY:.0%} of the {format_bytes(free)} that are free"


class _Shape(NamedTuple):
    """What is computed at once."""

    batch_size: int
    sequence_length: int
    tokens: int
    calibration_rows: int
    looking_rows: int

    def __str__(self) -> str:
        padded = self.batch_size * self.sequence_length
        if self.tokens == padded:
            return f"{self.batch_size} x {self.sequence_length} tokens"
        return f"{self.tokens} tokens of packed rows"


def _plan(
    planned: PlannedModel,
    adapter: AdapterConfig,
    shape: _Shape,
    optimizer: OptimizerKind,
    teacher: PlannedModel | None,
    checkpointing: Checkpointing,
) -> MemoryPlan:
    activations = plan_activations(
        planned.model,
        adapter,
        planned.dtype,
        planned.device,
        tokens=shape.tokens,
        sequence_length=shape.sequence_length,
        checkpointing=checkpointing,
    )
    counts = planned.counts
    tokens, padded = shape.tokens, shape.batch_size * shape.sequence_length
    process = 0 if planned.device.type == "cuda" else process_bytes()
    loss = loss_bytes(planned, tokens)
    teacher_rows: tuple[MemoryRow, ...] = ()
    if teacher is not None:
        loss += divergence_bytes(planned, teacher, tokens)
        beside = teacher.counts.frozen_bytes + teacher.counts.other_bytes
        teacher_rows = (MemoryRow("teacher", beside, "its weights; nothing of it trains"),)
    workspace = workspace_bytes(planned, counts, tokens, activations.widest)
    evaluating = max(
        loss_bytes(planned, padded),
        workspace_bytes(planned, counts, padded, activations.widest),
    )
    states = optimizer.state_bytes(counts.trained, counts.trained_bytes)
    merging = merging_bytes(planned, counts, adapter)
    method = method_of(adapter)
    in_training = method.rounds_in_training(adapter)
    rounding = 0
    if shape.calibration_rows:
        kept = planned.dtype.itemsize if not in_training else 4
        calibrating = shape.calibration_rows * shape.sequence_length
        rounding = rounding_bytes(planned, counts, kept, calibrating)
    looking = 0
    if shape.looking_rows:  # the weights are there as they train
        looked = shape.looking_rows * shape.sequence_length
        looking = rounding_bytes(planned, counts, 0, looked)
    weights = counts.frozen_bytes + counts.other_bytes + counts.trained_bytes
    held = process + weights + states + sum(row.bytes for row in teacher_rows)
    sparing = checkpointing == "layers"
    heap = _heap_bytes(planned, tokens, activations, sparing)
    if heap and tokens < padded:
        heap += HEAP_UNEVEN
    backward = max(loss, activations.recomputed_bytes + workspace)
    dtype = str(planned.dtype).removeprefix("torch.")
    kept_note = f"kept, {shape}, checkpointing {checkpointing}"
    rows = (
        MemoryRow("process", process, "Python, PyTorch, Transformers"),
        *_weight_rows(counts, dtype),
        *teacher_rows,
        MemoryRow("optimizer", states, optimizer.memory_note),
        MemoryRow("activations", activations.kept_bytes, kept_note),
        MemoryRow("recomputation", activations.recomputed_bytes, "of one layer's activations"),
        MemoryRow("layer workspace", workspace, "of the largest layer"),
        MemoryRow("loss", loss, "a chunk of logits; takes turns with the two before"),
        MemoryRow("heap", heap, "gaps between the tensors, which malloc keeps"),
        MemoryRow("rounding", rounding, _rounding_note(rounding, in_training, dtype)),
        *(
            [MemoryRow("looking", looking, "at the layers' inputs, before training")]
            * bool(looking)
        ),
        MemoryRow("evaluation", evaluating, "loss or workspace; nothing is kept"),
        MemoryRow("merging", merging, "float64 copies of one layer; the merged weights"),
    )
    step = counts.trained_bytes + activations.kept_bytes + backward + heap
    before = 0 if in_training else process + counts.other_bytes + rounding
    before = max(before, process + weights + looking if looking else 0)
    return MemoryPlan(
        rows=rows,
        training_bytes=max(held + step, before, held + rounding if in_training else 0),
        evaluation_bytes=held + evaluating,
        saving_bytes=process + weights + merging,
        weight_file_bytes=planned.file_bytes,
        bits_per_weight=counts.bits_per_weight,
        trainable_parameters=counts.trained,
        total_parameters=counts.total,
        device=planned.device.type,
        dtype=dtype,
        checkpointing=checkpointing,
        checkpointing_reason=f"{checkpointing}, as asked for",
        left_out=planned.left_out,
    )


def _heap_bytes(planned: PlannedModel, tokens: int, activations: Activations, sparing: bool) -> int:
    if planned.device.type != "cpu":
        return 0
    if sparing:  # what is large leaves no gaps
        return HEAP_BYTES
    transient = activations.kept_bytes + activations.recomputed_bytes
    buffers = buffer_bytes(planned, tokens, activations.widest)
    return HEAP_BYTES + HEAP_BUFFERS * buffers + int(HEAP_SHARE * transient)


def _weight_rows(counts: WeightCounts, dtype: str) -> tuple[MemoryRow, ...]:
    return (
        MemoryRow("frozen weights", counts.frozen_bytes, _frozen_note(counts, dtype)),
        MemoryRow("other weights", counts.other_bytes, f"embeddings, norms, head for {dtype}"),
        MemoryRow(
            "trained weights",
            counts.trained_bytes,
            f"{of_total(counts.trained, counts.total)} parameters",
        ),
        MemoryRow("gradients", counts.trained_bytes, "one per trained parameter"),
    )


def _rounding_note(rounding: int, in_training: bool, dtype: str) -> str:
    if not rounding:
        return "each weight by itself, while it is read"
    if in_training:
        return "float32 weights while they are rounded, between two steps"
    return f"{dtype} weights while they are rounded, before training"


def _frozen_note(counts: WeightCounts, dtype: str) -> str:
    if counts.bits_per_weight is not None:
        return f"{counts.quantised_layers} layers, {counts.bits_per_weight:.3f} bits per weight"
    return f"adapted layers in {dtype}" if counts.frozen_weights else "none"
