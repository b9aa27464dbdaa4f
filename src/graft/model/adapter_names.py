"""Whose the tensors of an adapter's file are, whatever prefix its names have.

Programs save one adapter under many names: with the adapter's own name inside, without PEFT's
prefix, with the wrappers of `torch.compile`, DDP and FSDP, or as the text part of a larger model.
A prefix is understood where every tensor then finds its one place, else it is named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from graft.text import quoted

PEFT_PREFIX = "base_model.model."
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_OUTER = frozenset({"base_model", "model", "module", "language_model", "text_model"})
"""Parts that stand before the names of a model's own modules, in any number and order."""
_NAMED = {
    "lora_A": ("weight", "bias"),
    "lora_B": ("weight", "bias"),
    "lora_embedding_A": ("",),
    "lora_embedding_B": ("",),
    "lora_magnitude_vector": ("", "weight"),
    "trainable_tokens_delta": ("",),
    "trainable_tokens_original": ("",),
}
"""What PEFT adds to a module, and what may stand behind it and the adapter's name."""
_UNUSED = frozenset({"original_module", "trainable_tokens_original"})
"""Copies of the base that PEFT keeps and computes nothing with."""


class Place(NamedTuple):
    """What a tensor is."""

    module: str
    """The model's name of the module that it belongs to; empty for a parameter of the model."""
    part: str
    """`lora_A.weight`, `trainable_tokens_delta` and their like, or a parameter of the module."""


class _Parsed(NamedTuple):
    path: tuple[str, ...]
    """Of the module, as the file calls it."""
    part: str
    adapter: str | None
    """The adapter's own name, where it stands in the tensor's."""


@dataclass(frozen=True)
class Placed:
    """The tensors of a file by what they are."""

    keys: Mapping[str, Place] = field(default_factory=dict)
    """The place of each tensor that is needed."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """How the file calls each module of `keys`, without PEFT's prefix."""
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _never(first: str, second: str) -> bool:
    return False


def place_tensors(
    keys: Iterable[str],
    names: Collection[str],
    prefix: str,
    equal: Callable[[str, str], bool] = _never,
) -> Placed:
    """Return whose each tensor of an adapter is.

    names: of the model's modules and parameters. prefix: what the model's own class puts before the
    names of its decoder, `model` or `transformer`. equal: whether two tensors hold the same; one
    place may have several such, as PEFT writes embeddings that were resized and trained.
    """
    outer = _OUTER | {prefix}
    cores: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        cores.setdefault(_core(tuple(name.split(".")), outer), []).append(name)
    places: dict[str, Place] = {}
    renamed: dict[str, str] = {}
    taken: dict[Place, str] = {}
    foreign, problems, adapters, wrappers = [], [], set[str](), set[str]()
    prefixes: dict[tuple[str, str], None] = {}
    for key in keys:
        parsed = _parse(key)
        found = cores.get(_core(parsed.path, outer), [])
        if parsed.part in _UNUSED:
            continue
        if len(found) != 1:
            foreign.append(key)
            continue
        place = _owner(found[0], parsed.part)
        if place in taken and parsed.adapter is None and equal(taken[place], key):
            continue
        if place in taken:
            problems.append(
                f"tensors {quoted(taken[place])} and {quoted(key)} are one and the same by their "
                "names; the file holds more than one adapter or state: keep one of them"
            )
            continue
        taken[place], places[key] = key, place
        if parsed.adapter is not None:
            adapters.add(parsed.adapter)
        raw = ".".join(parsed.path)
        renamed[place.module] = raw.removeprefix(PEFT_PREFIX)
        wrappers |= _WRAPPERS & set(key.split("."))
        core = ".".join(_core(parsed.path, outer))
        prefixes[raw.removesuffix(core), PEFT_PREFIX + found[0].removesuffix(core)] = None
    # Beside tensors that have a place, one of another part of the model is not theirs by mistake.
    problems = [_foreign(key, names, outer, not places) for key in foreign] + problems
    if len(adapters) > 1:
        problems.append(
            f"the file holds {len(adapters)} adapters, {', '.join(map(quoted, sorted(adapters)))}; "
            "save each by itself"
        )
    notes = [
        f"its tensors' names begin with {quoted(found) if found else 'no prefix'} where PEFT has "
        f"{quoted(usual)}: read as that, since each has one place in the model"
        for found, usual in list(prefixes)[:3]
        if found != usual
    ]
    if wrappers:
        notes.append(f"its tensors' names hold {', '.join(sorted(wrappers))}, which is left out")
    return Placed(places, renamed, tuple(problems), tuple(notes))


def file_name(placed: Placed, name: str) -> str:
    """Return what the file would call a module of the model, by how it calls the others."""
    if name in placed.renamed:
        return placed.renamed[name]
    for module, raw in placed.renamed.items():
        shared = 0
        ours, theirs = module.split("."), raw.split(".")
        while shared < min(len(ours), len(theirs)) and ours[-1 - shared] == theirs[-1 - shared]:
            shared += 1
        own = ".".join(ours[: len(ours) - shared])
        if shared and (not own or name.startswith(own + ".")):
            rest = name[len(own) + 1 :] if own else name
            return ".".join([*theirs[: len(theirs) - shared], rest])
    return name


def _parse(key: str) -> _Parsed:
    """Split a tensor's name into the module's path and what of it the tensor is."""
    parts = tuple(part for part in key.split(".") if part not in _WRAPPERS)
    for number, part in enumerate(parts):
        behind = parts[number + 1 :]
        if part == "token_adapter":
            inner = _parse(".".join(behind))
            return _Parsed(parts[:number], inner.part, inner.adapter)
        if part == "base_layer" or part == "original_module":
            return _Parsed(parts[:number], part if part in _UNUSED else ".".join(behind), None)
        if part == "modules_to_save" and len(behind) == 1:
            return _Parsed(parts[:number], behind[0], None)
        if part == "modules_to_save" and len(behind) > 1:
            return _Parsed((*parts[:number], *behind[1:-1]), behind[-1], behind[0])
        for ending in _NAMED.get(part, ()):
            last = (ending,) if ending else ()
            if len(behind) - len(last) in (0, 1) and behind[len(behind) - len(last) :] == last:
                own = behind[0] if len(behind) > len(last) else None
                if own in ("weight", "bias") and not ending:
                    continue
                shown = part if part == "lora_magnitude_vector" else ".".join((part, *last))
                return _Parsed(parts[:number], shown, own)
    return _Parsed(parts, "", None)


def _owner(name: str, part: str) -> Place:
    """Return the place of a tensor of a module, or of a parameter by its whole name."""
    if part:
        return Place(name, part)
    module, _, parameter = name.rpartition(".")
    return Place(module, parameter)


def _core(path: tuple[str, ...], outer: Collection[str]) -> tuple[str, ...]:
    """Return a path without what stands before the model's own names."""
    start = 0
    while start < len(path) - 1 and path[start] in outer:
        start += 1
    return path[start:]


def _foreign(key: str, names: Collection[str], outer: Collection[str], hint: bool) -> str:
    """Return what is wrong with a tensor without a place; with `hint`, and which prefix hinders."""
    problem = f"tensor {quoted(key)} belongs to no layer of this model"
    path = _parse(key).path
    known = {".".join(_core(tuple(name.split(".")), outer)) for name in names}
    for start in range(1, len(path) if hint else 1):
        if ".".join(path[start:]) in known:
            return f"{problem}; without its prefix {quoted('.'.join(path[:start]) + '.')} it would"
    return problem
