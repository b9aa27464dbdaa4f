"""PyTorch and Transformers imported without what a process of graft's own never uses.

Transformers imports at once what it may need for models that are compiled or lie on several
machines, and for pictures: TorchDynamo, DTensor, FSDP, and whatever of accelerate, scikit-learn and
torchvision is installed. That is more than half of the time until a command's first word, and
graft's commands use none of it. What is imported later, by a model's own code for instance, is the
real thing.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_DYNAMO = "torch._dynamo"
_INDEX = f"{_DYNAMO}._trace_wrapped_higher_order_op"

_FIRST = (
    "transformers.modeling_utils",
    "transformers.masking_utils",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "torch.fx.experimental.symbolic_shapes",
)
"""What every model needs of Transformers, and PyTorch of sympy for its modules' shapes."""

_UNUSED = tuple(
    f"is_{package}_available"
    for package in (
        *(
            "accelerate",
            "auto_round",
            "bitsandbytes",
            "compressed_tensors",
            "deepspeed",
            "fp_quant",
        ),
        *("gptqmodel", "hqq", "kernels", "librosa", "mlx", "optimum_quanto", "peft", "quark"),
        *("scipy", "sklearn", "soundfile", "torch_distributed", "torchao", "torchaudio"),
        *("torchvision", "torchvision_v2"),
    )
)
"""Questions by which Transformers decides what to import, each of which may be answered with no:
there is PyTorch without `distributed`, too."""


_lean = False


def is_lean() -> bool:
    """Return whether this process imported both by `import_models`: it is 110 MiB smaller."""
    return _lean


def import_models() -> None:
    """Import PyTorch and what Transformers loads and computes models with.

    Where either is imported already nothing is done. For a process that is graft's own: from then
    on Transformers takes it for one on a single machine, and functions that it keeps from being
    compiled are as they were written.
    """
    global _lean
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    _lean = True
    # Of what is imported nothing is garbage, and looking for some takes a fifth of the time.
    collects = gc.isenabled()
    gc.disable()
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        # What is wrong with an installation is told where it is imported for its use.
        with suppress(Exception):
            import_module("torch")
            with _without_dynamo():
                for name in _FIRST:
                    import_module(name)
    finally:
        sys.meta_path.remove(finder)
        gc.freeze()
        if collects:
            gc.enable()


class _Finder(MetaPathFinder):
    """Finds the modules of which something changes as soon as they are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        change = _CHANGES.get(fullname)
        spec = None if change is None else PathFinder.find_spec(fullname, path, target)
        if change is not None and spec is not None and spec.loader is not None:
            spec.loader = _Changing(spec.loader, change)
        return spec


class _Changing(Loader):
    def __init__(self, loader: Loader, change: Callable[[Any], None]) -> None:
        self.loader, self.change = loader, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        with suppress(AttributeError):  # of another version, which is as quick as it is
            self.change(module)


def _no(*_: Any, **__: Any) -> bool:
    """Answer a question, which some ask with the least version that they want."""
    return False


def _look_once(checks: Any) -> None:
    """Answer what Transformers asks, and let it read the 100 MB of its models' code once.

    It reads them twice, under two names, for the names that each file has in `__all__`.
    """
    for question in _UNUSED:
        if hasattr(checks, question):
            setattr(checks, question, functools.cache(_no))
    structure, names = checks.create_import_structure_from_path, checks.fetch__all__

    def of_folder(path: str | Path) -> Any:
        folder = Path(path)
        return structure(str(folder.parent if folder.is_file() else folder))

    def of_end(content: str) -> Any:
        """Take the last line that begins with `__all__`, without making lines of all others."""
        place = content.rfind("\n__all__")
        return names(content if place < 0 else content[place + 1 :])

    checks.create_import_structure_from_path, checks.fetch__all__ = of_folder, of_end


def _compile_later(compiling: Any) -> None:
    """Let PyTorch ask TorchDynamo to leave a function alone where that has been imported.

    Where it has not, nothing is compiled.
    """
    original = compiling._disable_dynamo

    def leave_alone(function: Any = None, recursive: bool = True) -> Any:
        if function is None:
            return functools.partial(leave_alone, recursive=recursive)
        disabled = original(function, recursive)

        @functools.wraps(function)
        def called(*arguments: Any, **options: Any) -> Any:
            chosen = disabled if _DYNAMO in sys.modules else function
            return chosen(*arguments, **options)

        return called

    compiling._disable_dynamo = leave_alone


def _step_without_breaks(optimizers: Any) -> None:
    """Let an optimizer's step ask TorchDynamo to break its graph only where that is imported."""
    original = optimizers._use_grad_for_differentiable

    def without_breaks(step: Any) -> Any:
        broken = original(step)

        @functools.wraps(step)
        def called(optimizer: Any, *arguments: Any, **options: Any) -> Any:
            if _DYNAMO in sys.modules:
                return broken(optimizer, *arguments, **options)
            with optimizers.torch.set_grad_enabled(optimizer.defaults["differentiable"]):
                return step(optimizer, *arguments, **options)

        return called

    optimizers._use_grad_for_differentiable = without_breaks


_CHANGES: dict[str, Callable[[Any], None]] = {
    "torch._compile": _compile_later,
    "torch.optim.optimizer": _step_without_breaks,
    "transformers.utils.import_utils": _look_once,
}


@contextmanager
def _without_dynamo() -> Iterator[None]:
    """Have a stand-in for TorchDynamo while the block imports Transformers.

    It has what Transformers' functions are marked with, for a compiler that never comes. Where
    anything else is asked of it, as another version may do, what was imported of Transformers is
    forgotten: who needs it imports it with the real one.
    """
    import torch

    before, asked = set(sys.modules), list[str]()
    if _DYNAMO in before:
        yield
        return
    dynamo, index = _StandIn(_DYNAMO, asked), _StandIn(_INDEX, asked)
    vars(dynamo).update(
        disable=_as_it_is,
        allow_in_graph=_as_it_is,
        assume_constant_result=_as_it_is,
        _trace_wrapped_higher_order_op=index,
    )
    vars(index).update(TransformGetItemToIndex=_transform)
    sys.modules |= {_DYNAMO: dynamo, _INDEX: index}
    try:
        yield
    finally:
        for name in (_DYNAMO, _INDEX):
            sys.modules.pop(name, None)
        vars(torch).pop("_dynamo", None)
        if asked:
            for name in set(sys.modules) - before:
                if name.partition(".")[0] == "transformers":
                    del sys.modules[name]


class _StandIn(ModuleType):
    def __init__(self, name: str, asked: list[str]) -> None:
        super().__init__(name)
        self._asked = asked

    def __getattr__(self, name: str) -> Any:
        if name not in ("__file__", "__path__") or (name, self.__name__) == ("__path__", _DYNAMO):
            self._asked.append(name)  # the last one, where another module of it is looked for
        raise AttributeError(f"{self.__name__} has no {name} while Transformers is imported")


def _as_it_is(function: Any = None, *arguments: Any, **options: Any) -> Any:
    return _as_it_is if function is None else function


def _transform() -> Any:
    return import_module(_INDEX).TransformGetItemToIndex()
