"""Which layers are quantised and adapted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel

from graft.adapters.attach import adapted_layers, frozen_layers, replace_module
from graft.errors import raise_problems
from graft.formats.dense import DenseFormat
from graft.layers.factored import factored_layers
from graft.layers.frozen import FrozenLinear
from graft.layers.registry import find_kind, kind_of
from graft.model.internals import copied
from graft.model.read_past import read_past
from graft.model.text_modules import text_modules
from graft.patterns import match_names
from graft.text import quoted


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return every linear layer that graft packs and adapts by name, in the model's order.

    They are all but the output head and those of `kept_layers`.
    """
    kept = kept_layers(model)
    return {name: module for name, module in _linear(model).items() if name not in kept}


def kept_layers(model: PreTrainedModel) -> dict[str, str]:
    """Return the linear layers that stay as they are, each with the reason, in a few words."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    shared = {*tied, *tied.values()}
    read, kept = read_past(model), {}
    reads_text = {name for name, _ in text_modules(model)}
    for name, module in _linear(model).items():
        kind = find_kind(module)
        if kind is not None and name not in reads_text:
            kept[name] = "it reads no text"
        elif kind is not None and f"{name}.{kind.weight}" in shared:
            kept[name] = "several layers share its weight"
        elif name in read and kind is not None:
            kept[name] = f"{read[name]} reads its weight itself"
    return kept


def _linear(model: PreTrainedModel) -> dict[str, nn.Module]:
    head = model.get_output_embeddings()
    adapted = dict(adapted_layers(model))
    inside = tuple(f"{name}." for name in adapted)
    return {
        name: module
        for name, module in model.named_modules()
        if (name in adapted or find_kind(module) is not None)
        and module is not head
        and not name.startswith(inside)
    }


def select_targets(model: PreTrainedModel, patterns: Sequence[str]) -> list[str]:
    """Return the names of the layers that the patterns choose, in the model's order.

    No pattern chooses every linear layer but the head. A pattern is a full name, a suffix of whole
    name parts ('q_proj', 'attn.c_attn'), or a regular expression that matches a full name. A layer
    that is two low-rank factors is chosen by its name or that of either.
    Raises GraftError when a pattern matches nothing, with the names that there are.
    """
    names = list(linear_layers(model))
    if not patterns:
        kept = list(kept_layers(model).items())
        none = "the model has no linear layers that graft adapts"
        why = "".join(f"; {name}: {reason}" for name, reason in kept[:3])
        raise_problems([] if names else [none + why], "targets")
        return names
    problems = []
    chosen: set[str] = set()
    # A factored layer's name stands for both of its factors.
    inside = {
        whole: [name for name in names if name.startswith(f"{whole}.")]
        for whole, _ in factored_layers(model)
    }
    known = [*names, *inside]
    for pattern, expression in zip(patterns, match_names(patterns, known), strict=True):
        matched = {name for name in known if name == pattern or name.endswith("." + pattern)}
        matched.update(expression.names)
        chosen.update(part for name in matched for part in inside.get(name, [name]))
        if expression.problem and not matched:
            problems.append(f"{quoted(pattern)} {expression.problem}")
        elif not matched and (reason := _reason(model, pattern)):
            problems.append(f"{quoted(pattern)} stays as it is: {reason}")
        elif not matched:
            kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            problems.append(
                f"{quoted(pattern)} matches none of the {len(names)} linear layers; they end in: "
                f"{kinds} (a full name is {names[0] if names else '-'})"
            )
    raise_problems(problems, "targets")
    return [name for name in names if name in chosen]


def _reason(model: PreTrainedModel, pattern: str) -> str | None:
    """Return why the layers that a pattern names stay as they are, if it names any of those."""
    kept = kept_layers(model)
    named = match_names([pattern], list(kept))[0].names
    ends = (name for name in kept if name == pattern or name.endswith("." + pattern))
    return next((kept[name] for name in (*named, *ends)), None)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer that carries no adapter."""
    return kind_of(module).shape(module)


def freeze_layers(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Turn the named layers, where they are not frozen, into dense ones that share their data."""
    frozen = {name for name, _ in frozen_layers(model)}
    for name in names:
        module = model.get_submodule(name)
        kind = find_kind(module)
        if kind is None or name in frozen:
            continue
        weight = kind.rows(module, module.get_parameter(kind.weight).detach())
        weight_format = DenseFormat(str(weight.dtype).removeprefix("torch."))
        layer = kind.frozen(module, weight_format, {"weight": weight}, kind.bias(module))
        layer.stands_for = (copied(module, parameters=False),)
        replace_module(model, name, layer)


def thaw_layers(model: PreTrainedModel) -> None:
    """Put plain modules in the place of the layers that `freeze_layers` froze and nothing adapts.

    They share the weights, and compute what the model computed before, bit for bit.
    """
    inside = {f"{name}.base" for name, _ in adapted_layers(model)}
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, FrozenLinear) or name in inside or not layer.stands_for:
            continue
        module = copied(layer.stands_for[0], parameters=True)
        kind = kind_of(module)
        weight = kind.stored(module, layer.packed["weight"].detach())
        setattr(module, kind.weight, nn.Parameter(weight, requires_grad=False))
        if layer.bias is not None:
            module.bias = layer.bias
        replace_module(model, name, module)
