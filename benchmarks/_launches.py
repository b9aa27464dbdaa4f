"""What a training step would launch on a GPU, counted on a machine without one.

The step is graft's own, on the CPU, of a model of a few small layers: how many kernels are launched
depends on neither width nor length. Every operation goes through the Triton backend, whose kernels
are counted and not run; the numbers come from the reference. What a layer launches is what a second
layer adds.

An operation of PyTorch counts as one launch, or as many as CUDA makes of it at least; views and
allocations count as none. What waits for the GPU is counted beside it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch
from _shapes import LlamaShape
from _timing import Laps
from _training import graft_training
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from graft.kernels.backend import operation, registry, triton_launch
from graft.kernels.backend.reference import reference
from graft.kernels.low_rank import triton as low_rank
from graft.model.running import attention, loss

STEPS, COUNTED = 4, 3
"""A training has so many steps, and this one of them is counted. The first makes the optimizer's
states, and after some of the others the loop asks more than it does after most."""

_FREE = frozenset(
    "_local_scalar_dense _record_function_enter_new _record_function_exit _unsafe_view as_strided "
    "device empty empty_like empty_strided is_same_size lift_fresh new_empty new_empty_strided "
    "resize_ set_".split()
)
_SEVERAL = {
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,  # sums over shared heads too
    "nonzero": 3,
    "slice_backward": 2,
}
_LISTS = {"_foreach_": 110, "_fused_": 36}
"""How many tensors a launch of the operations on lists takes, by what their names begin with."""
_WAITS = frozenset(("_local_scalar_dense", "nonzero"))


class Launch(NamedTuple):
    """What was launched: where from, in which direction, and what."""

    where: str
    direction: str
    what: str


class Watch(TorchDispatchMode):
    """Counts launches and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[Launch] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name in _WAITS:
            self.waits[_where()] += 1
        if count := _launches_of(func, name, args, result):
            self.add(name, count)
        return result

    def add(self, what: str, count: int = 1) -> None:
        direction = "backward" if _is_backward() else "forward"
        self.launches[Launch(_where(), direction, what)] += count


def _launches_of(func: Any, name: str, args: Any, result: Any) -> int:
    alias = func._schema.returns[0].alias_info if func._schema.returns else None
    if name in _FREE or (alias is not None and not alias.is_write and not _copied(args, result)):
        return 0
    for prefix, most in _LISTS.items():
        if name.startswith(prefix):
            return -(-len(args[0]) // most)
    return _SEVERAL.get(name, 1)


def _copied(args: Any, result: Any) -> bool:
    """Return whether what may give a view, as `reshape` does, has given a copy."""
    own = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
    return isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in own


def _is_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _where() -> str:
    """Return which of graft's or transformers' files is being run, innermost, or 'autograd'."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        for root in ("/src/graft/", "/graft/", "/transformers/"):
            inside = path.rpartition(root)[2]
            if inside != path and not inside.startswith("kernels/backend/"):
                nobody = inside.startswith("train/") and _is_backward()
                return "autograd" if nobody else inside.removesuffix(".py")
        frame = frame.f_back
    return "elsewhere"


# As on a GPU --------------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[Watch]:
    """Count what is launched meanwhile, on the CPU, by what would run on a GPU."""
    watch, own = Watch(), triton_launch.triton
    both = {
        name: _counted(compute, reference.operations[name])
        for name, compute in own.operations.items()
    }
    here = replace(
        own,
        device_types=frozenset({"cpu"}),
        why_unavailable=lambda: None,
        operations=both,
    )
    with ExitStack() as stack:
        for where, name, value in (
            (registry, "_backends", [here, reference]),
            (triton_launch, "_kernels", lambda: _Kernels(watch)),
            (operation, "nobody_watches", lambda: True),
            (low_rank, "_float32_product", torch.mm),
            (attention, "_computes", lambda *tensors: False),
            (loss, "BLOCK_LOGITS", sys.maxsize),
            (torch.nn.utils.clip_grad, "_has_foreach_support", lambda *arguments: True),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(watch)
        yield watch


def _counted(compute: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return an implementation that is counted, and whose numbers are the reference's."""

    def both(*arguments: Any) -> Any:
        compute(*arguments)
        with _disable_current_modes():
            return plain(*arguments)

    return both


class _Kernels:
    """Stands for the module of the Triton kernels, and counts their launches."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __getattr__(self, name: str) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.watch.add(f"triton {name}")

        class Kernel:
            def __getitem__(self, grid: Any) -> Any:
                return launch

        return Kernel()


# A step -------------------------------------------------------------------------------------------


def step_launches(method: str, layers: int) -> Watch:
    """Return what one training step of a model of so many layers launches, and where it waits."""
    torch.manual_seed(0)
    shape = LlamaShape(32, layers, 64, 2, 1, vocabulary=64)
    found = Watch()
    with counted() as watch:

        class Steps(Laps):
            def lap(self) -> None:
                super().lap()
                if len(self.seconds) == COUNTED:
                    found.launches, found.waits = watch.launches.copy(), watch.waits.copy()
                watch.launches.clear()
                watch.waits.clear()

        run = graft_training(shape, method, "none", torch.randint(64, (2, 12)))
        run(STEPS, Steps())
    return found


def launch_table(method: str, layers: int) -> list[dict[str, object]]:
    """Return rows of what a layer launches, and a step of so many layers; the last row sums up."""
    one, two = (step_launches(method, count).launches for count in (1, 2))
    layer = {launch: two[launch] - one[launch] for launch in two}
    step = {launch: one[launch] + (layers - 1) * layer[launch] for launch in two}
    rows: list[dict[str, object]] = [
        {"method": method, **launch._asdict(), "a layer": layer[launch], "a step": step[launch]}
        for launch in sorted(two, key=lambda each: -step[each])
    ]
    total = {"where": "all", "direction": "", "what": ""}
    sums = {"a layer": sum(layer.values()), "a step": sum(step.values())}
    return [*rows, {"method": method, **total, **sums}]
