"""Layers whose weight other modules ask for themselves, past the layer's own forward.

What takes such a layer's place is not called there, so that an adapter would do nothing and packed
weights would be missing: Mamba hands the weights of three projections to one kernel, RWKV scales
its own. Nothing but the code of the modules says so.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from torch import nn
from transformers import PreTrainedModel

_PREPARES = ("__init__", "_init", "init_", "_tie", "tie_", "get_", "set_", "reset_")
"""Beginnings of the names of functions that prepare a model and compute nothing with it."""
_SWITCHED = {"BloomAttention": "slow_but_exact", "BloomMLP": "slow_but_exact"}
"""Classes that read weights only where this attribute of theirs is true."""


@dataclass
class _Reads:
    """The layers whose weights a class reads."""

    own: set[str] = field(default_factory=set)
    """Paths of its own children."""
    any: set[str] = field(default_factory=set)
    """Ends of paths of modules that it is given."""


def read_past(model: nn.Module) -> dict[str, str]:
    """Return the layers of a model whose weights are read directly, each with the class that does.

    A function without source, as in an archive, is taken to read none.
    """
    found: dict[str, str] = {}
    ends: dict[str, str] = {}
    for name, module in model.named_modules():
        kind: type[nn.Module] = type(module)
        if kind.__name__ in _SWITCHED and not getattr(module, _SWITCHED[kind.__name__], True):
            continue
        reads = _reads(kind)  # type: ignore[arg-type]
        found |= {f"{name}.{path}": kind.__name__ for path in reads.own}
        ends |= {f".{path}": kind.__name__ for path in reads.any}
    for name, _ in model.named_modules() if ends else ():
        for end, reader in ends.items():
            if f".{name}".endswith(end):
                found[name] = reader
    return found


@cache
def _reads(kind: type[nn.Module]) -> _Reads:
    reads = _Reads()
    for base in kind.__mro__:
        if base in (nn.Module, PreTrainedModel) or base.__module__.startswith("graft."):
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if inspect.isfunction(value) else None
            if function is None or name.startswith(_PREPARES):
                continue
            if "weight" not in function.__code__.co_names:
                continue
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            except (OSError, SyntaxError):
                continue
            for root, path in _weights(tree):
                (reads.own if root == "self" else reads.any).add(path)
    return reads


def _weights(function: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the variable and the path below it of each `variable.path.weight` that is read."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Attribute) or node.attr != "weight":
            continue
        parts: list[str] = []
        value = node.value
        while isinstance(value, ast.Attribute):
            parts.append(value.attr)
            value = value.value
        if parts and isinstance(value, ast.Name):
            yield value.id, ".".join(reversed(parts))
