"""Which layers an adapter's configuration says that it adapts, to find tensors that are lost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from graft.model.adapter_names import Placed, file_name
from graft.model.targets import linear_layers
from graft.patterns import match_names
from graft.text import quoted

Targets = Callable[[PreTrainedModel, Callable[[str], str]], set[str] | None]
"""Of a model and a function from its names of modules to those that the adapter's files have:
which modules are adapted, by the model's names; None where nothing says it."""

_ALL = "all-linear"
_TOLD = 20


def adaptable(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules that PEFT adapts: linear layers, the output head, embeddings."""
    head = model.get_output_embeddings()
    linear = linear_layers(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name in linear or module is head or isinstance(module, nn.Embedding)
    }


def peft_targets(
    config: Mapping[str, Any], model: PreTrainedModel, as_filed: Callable[[str], str]
) -> set[str] | None:
    """Return what target_modules and its kin choose, as PEFT reads them; see `Targets`."""
    modules = adaptable(model)
    wanted = config.get("target_modules")
    if wanted is None:
        return None
    names = {name: {name, as_filed(name)} for name in modules}
    every = sorted(set().union(*names.values())) if names else []
    excluded = _chosen(config.get("exclude_modules") or [], every)
    saved = config.get("modules_to_save") or []
    inside = [rf"(.*\.)?({one})(\..*)?" for one in saved if isinstance(one, str)]
    excluded |= {name for found in match_names(inside, every) for name in found.names}
    if isinstance(wanted, str) and wanted.lower() == _ALL:
        return {name for name in linear_layers(model) if not names[name] & excluded}
    matched = _chosen(wanted, every)
    layers = config.get("layers_to_transform")
    if not isinstance(wanted, str) and layers not in (None, []):
        numbers = {layers} if isinstance(layers, int) else set(layers)
        matched = _in_layers(matched, numbers, config.get("layers_pattern"))
    return {name for name, known in names.items() if known & matched and not known & excluded}


def _chosen(wanted: str | Iterable[str], names: Sequence[str]) -> set[str]:
    """Return the names that a regular expression matches, or that a list has or that end so."""
    if isinstance(wanted, str):
        return set(match_names([wanted], names)[0].names)
    endings = {one for one in wanted if isinstance(one, str)}
    return {name for name in names if any(name[start:] in endings for start in _starts(name))}


def _starts(name: str) -> Iterable[int]:
    """Return where the parts of a name begin."""
    return (0, *(place + 1 for place, letter in enumerate(name) if letter == "."))


def _in_layers(
    names: Collection[str], numbers: set[int], pattern: str | Sequence[str] | None
) -> set[str]:
    """Return the names whose first number, or that behind the pattern, is one of those."""
    containers = [pattern] if isinstance(pattern, str) and pattern else list(pattern or ())
    kept = set()
    for name in names:
        parts = name.split(".")
        found = None
        for place in range(1, len(parts) - 1):
            behind = ".".join(parts[:place])
            fits = not containers or any(
                behind == one or behind.endswith(f".{one}") for one in containers
            )
            # Without a pattern PEFT wants a part before the container.
            if parts[place].isdecimal() and fits and (containers or place > 1):
                found = int(parts[place])
                break
        if found in numbers:
            kept.add(name)
    return kept


def lost_layers(
    targets: Targets,
    model: PreTrainedModel,
    placed: Placed,
    held: Collection[str],
    following: Collection[str] = (),
) -> list[str]:
    """Return what is wrong between the layers that the configuration names and the file holds.

    held: names of the modules that the file has low-rank tensors of. following: those that have the
    tensors of another module, and may have them in the file too.
    """
    wanted = targets(model, lambda name: file_name(placed, name))
    if wanted is None:  # then the other layers say what there should be
        endings = {name.rpartition(".")[2] for name in held}
        wanted = {name for name in linear_layers(model) if name.rpartition(".")[2] in endings}
        wanted |= set(held)
    problems = []
    missing = [
        name for name in adaptable(model) if name in wanted and name not in {*held, *following}
    ]
    if missing:
        problems.append(
            f"the file has no tensors for {len(missing)} of the {len(wanted)} layers that "
            f"adapter_config.json targets: {', '.join(missing[:_TOLD])}"
            + (f" and {len(missing) - _TOLD} more" if len(missing) > _TOLD else "")
            + "; it is not whole (was a part of it lost?)"
        )
    foreign = [name for name in held if name not in wanted and name not in following]
    if foreign:
        problems.append(
            f"the file adapts {len(foreign)} layers that adapter_config.json does not target, such "
            f"as {quoted(foreign[0])}: PEFT leaves them out; mend target_modules if they belong to "
            "it"
        )
    return problems
