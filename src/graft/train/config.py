"""How long and how fast to train, and where the results go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from graft.objectives.config import ObjectiveConfig
from graft.optimizers.registry import DEFAULT_OPTIMIZER, OPTIMIZERS
from graft.train.trackers import TRACKERS

Batching = Literal["auto", "packed", "grouped", "padded"]


@dataclass(frozen=True, kw_only=True)
class LoopConfig(ObjectiveConfig):
    """The training loop."""

    GROUP: ClassVar[str] = "training"
    RARE: ClassVar[frozenset[str]] = frozenset(
        {
            *("warmup_fraction", "weight_decay", "max_grad_norm", "save_minutes", "checkpoints"),
            *("eval_epochs", "min_improvement", "samples", "track", "general_text", "batching"),
            "cuda_graphs",
        }
    )
    EITHER_OR: ClassVar[tuple[tuple[str, str], ...]] = (
        ("steps", "epochs"),
        ("eval_every", "eval_epochs"),
    )

    out: str
    """Folder of the run, made new; with --resume the folder of the run to go on with."""
    steps: int | None = None
    """Steps to train, or give --epochs (default: 1 epoch)."""
    epochs: float | None = None
    """Passes over the training rows; give this or --steps."""
    batch_size: int = 16
    """Rows that are computed at once."""
    grad_accum: int = 1
    """Batches added up to one optimizer step."""
    batching: Batching = "auto"
    """How the rows of a batch become tensors. packed: one behind the other without padding, none of
    which sees another; loss and gradients are those of padded rows. grouped: padded to the longest,
    in batches of rows of about one length. padded: padded, in batches as they come. auto packs
    where the model can, and groups otherwise."""
    optimizer: Annotated[str, OPTIMIZERS] = DEFAULT_OPTIMIZER
    """What takes the steps."""
    learning_rate: float | None = None
    """Peak learning rate; the default follows from method, hidden size, rank and alpha."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 0.01
    """Gradients are scaled down to this norm when they exceed it. At the default nearly every
    step's are, so that AdamW's averages do not remember the large ones of the first steps."""
    checkpointing: Literal["auto", "none", "products", "half", "layers"] = "auto"
    """What each decoder layer keeps for the backward pass: everything (none); its input and its
    matrix products, so that only pointwise parts are recomputed (products); those without every
    second one that is much wider than its input (half); little more than its input (layers). auto
    takes the first of them whose planned peak fits into 80 % of the free memory. The gradients are
    the same, bit for bit."""
    cuda_graphs: bool = False
    """Record forward and backward of each shape of a batch as a CUDA graph, which is one launch
    where a small model makes thousands. Rows are padded to multiples of 64 tokens. It is tested
    without a GPU, and neither run nor measured on one yet."""
    eval_every: int | None = None
    """Steps between evaluations; the default evaluates at the beginning and at the end."""
    eval_epochs: float | None = None
    """Passes over the training rows between evaluations, in place of --eval-every."""
    keep: Literal["best", "last"] = "best"
    """Which parameters the run ends with, and every export deploys: those of the evaluation with
    the lowest held-out loss, or those of the last step. Of steps before the weights are rounded
    (merge_aware) none is kept."""
    patience: int | None = None
    """Evaluations without a lower held-out loss after which training ends early; the default does
    all steps. The learning rate's schedule stays that of all steps."""
    min_improvement: float = 0.0
    """By how much, in nats, the held-out loss must fall to count for --patience."""
    samples: int = 0
    """Held-out prompts that are continued at each evaluation, greedily and by at most 64 tokens;
    they go to samples.jsonl in the run's folder, and to the trackers."""
    general_text: str | None = None
    """UTF-8 text on which the drift from the base is measured, before and after training; the first
    2048 tokens are read. The default is a text of everyday facts, arithmetic and code."""
    track: tuple[Annotated[str, TRACKERS], ...] = ()
    """Who else is told of metrics and samples."""
    save_every: int | None = None
    """Steps between checkpoints, beside --save-minutes."""
    save_minutes: float = 10.0
    """Minutes between checkpoints. The last two are kept, and one is written at the end, so that a
    finished run can be given more steps."""
    checkpoints: bool = True
    """Write checkpoints. Without, whatever --save-every says, there is one only of a training that
    is told to stop (Ctrl-C, SIGTERM, SIGHUP); a run that was killed begins anew."""
    resume: bool = False
    """Go on with the run in --out, from its newest checkpoint that is whole, or anew where it has
    none; with more --steps or --epochs beyond where it ended."""
    seed: int = 0
    """Seed of the adapter's random start, of the held-out split and of the order of the rows."""
