"""Which weights train where a run trains weights themselves: by name, range of layers or kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from graft.adapters.config import AdapterConfig
from graft.adapters.registry import method_of
from graft.errors import did_you_mean, raise_problems
from graft.layers.factored import Factored
from graft.layers.registry import find_kind
from graft.model.decoder_layers import decoder_layer_of
from graft.model.families import family_of, is_class
from graft.model.targets import select_targets
from graft.patterns import match_names
from graft.text import listed, quoted

_RANGE = re.compile(r"layers\.(\d*)-(\d*)(?:\.(.+))?")
"""layers.20-31, layers.20-, layers.-3, and with a kind or a name behind: layers.20-31.attention."""


def what_trains(model: PreTrainedModel, config: AdapterConfig) -> list[str]:
    """Return the layers that a method adapts, or the parameters that it trains itself, by name.

    model: without frozen or adapted layers. Raises GraftError with every word that chooses nothing.
    """
    if method_of(config).trains_adapter:
        return select_targets(model, config.targets)
    if config.targets:  # what there was before --train, which says it of linear layers alone
        inside = tuple(f"{name}." for name in select_targets(model, config.targets))
        return [name for name, _ in model.named_parameters() if name.startswith(inside)]
    return select_trained(model, config.train)


def select_trained(model: PreTrainedModel, words: Sequence[str]) -> list[str]:
    """Return the names of the parameters that the words choose, in the model's order.

    No word chooses all. A word may hold several with commas between them, and each is a kind
    (`KINDS`), a range of decoder layers (layers.20-31, whatever the family calls them; a kind or a
    name may follow: layers.20-31.mlp), a full name or a suffix of whole name parts of a module or a
    parameter ('q_proj', 'q_proj.bias'), or a regular expression that matches a full name of either.
    Of tensors that are tied it is the one that the model has first. Raises GraftError with every
    word that chooses nothing, the nearest name, and what there is.
    """
    names = {name: parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    first = {id(parameter): name for name, parameter in reversed(names.items())}
    one = {name: first[id(parameter)] for name, parameter in names.items()}
    wanted = [part for word in words for part in _parts(word)]
    if not wanted:
        return list(dict.fromkeys(one.values()))
    chosen: set[str] = set()
    problems = []
    for word in wanted:
        found, problem = _chosen(model, word, list(names))
        chosen |= {one[name] for name in found}
        if not found:
            problems.append(problem or _nothing(model, word, list(names)))
    raise_problems(problems, "train")
    return [name for name in dict.fromkeys(one.values()) if name in chosen]


def trained_note(model: PreTrainedModel, names: Sequence[str]) -> str:
    """Return in words how much of a model the chosen parameters are, and which of them are tied."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    count, total = sum(sizes[name] for name in names), sum(sizes.values())
    note = f"trains {len(names)} of {len(sizes)} tensors, {of_total(count, total)} parameters"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = [
        f"{other} is {name}"
        for name in names
        for other in parameters
        if other != name and parameters[other] is parameters[name]
    ]
    return note + (f"; tied, so that they train as one tensor: {', '.join(tied)}" if tied else "")


def of_total(count: int, total: int) -> str:
    """Return '1,234 of 56,789 (2.17 %)'."""
    return f"{count:,} of {total:,} ({100 * count / max(total, 1):.3g} %)"


def _parts(word: str) -> list[str]:
    """Return what commas separate, but for those inside the brackets of a regular expression."""
    parts, depth, begin = [], 0, 0
    for index, letter in enumerate(word):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            parts.append(word[begin:index])
            begin = index + 1
    return [part for part in (one.strip() for one in (*parts, word[begin:])) if part]


def _chosen(
    model: PreTrainedModel, word: str, names: Sequence[str]
) -> tuple[Iterable[str], str | None]:
    """Return the parameters that a word chooses, and why it cannot choose any, where that is known.

    names: of all parameters, those that are tied too.
    """
    if word in KINDS:
        return KINDS[word](model, names), None
    if span := _RANGE.fullmatch(word):
        return _in_range(model, span, names)
    return _named(word, names)


def _in_range(
    model: PreTrainedModel, span: re.Match[str], names: Sequence[str]
) -> tuple[Iterable[str], str | None]:
    low, high, rest = span.groups()
    numbers = {name: number for name in names if (number := _number(name)) is not None}
    last = max(numbers.values(), default=-1)
    begin, end = int(low or 0), int(high or last)
    if begin > end or end > last:
        there = f"layers 0 to {last}" if numbers else "no numbered layers"
        return [], f"{quoted(span[0])} is no range of this model's layers: it has {there}"
    inside = {name for name, number in numbers.items() if begin <= number <= end}
    found, problem = (names, None) if rest is None else _chosen(model, rest, names)
    return inside & set(found), problem


def _number(name: str) -> int | None:
    layer = decoder_layer_of(name)
    return None if layer is None else int(layer.rpartition(".")[2])


def _named(word: str, names: Sequence[str]) -> tuple[Iterable[str], str | None]:
    within = {
        module: [name for name in names if _is_in(name, module)] for module in _modules(names)
    }
    expression = match_names([word], [*within, *names])[0]
    matched = {name for name in (*within, *names) if name == word or name.endswith("." + word)}
    found = {name for one in (*matched, *expression.names) for name in within.get(one, [one])}
    problem = f"{quoted(word)} {expression.problem}" if expression.problem else None
    return found, problem


def _modules(names: Iterable[str]) -> dict[str, None]:
    """Return the names of all modules that hold parameters, at any depth."""
    parts = (name.split(".") for name in names)
    return dict.fromkeys(".".join(part[:end]) for part in parts for end in range(1, len(part)))


def _is_in(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _nothing(model: PreTrainedModel, word: str, names: Sequence[str]) -> str:
    """Return that a word chooses nothing, the nearest that would, and what there is."""
    kinds = [kind for kind, choose in KINDS.items() if choose(model, names)]
    if word in KINDS:
        return f"this model has no {word}; it has {', '.join(kinds)}"
    ends = dict.fromkeys(
        part for name in (*_modules(names), *names) if not (part := name.split(".")[-1]).isdecimal()
    )
    last = max((number for name in names if (number := _number(name)) is not None), default=-1)
    layers = f"; layers.0-{last} or a part of it" if last >= 0 else ""
    near = did_you_mean(word.rpartition(".")[2], [*kinds, *ends])
    return (
        f"{quoted(word)} is no kind and matches no name{near}. Kinds: {', '.join(kinds)}{layers}; "
        f"names end in: {listed(ends, 30)} (a full name is {names[0]})"
    )


# The kinds --------------------------------------------------------------------------------------


def _inside(model: nn.Module, is_one: Callable[[str, nn.Module], bool]) -> tuple[str, ...]:
    return tuple(f"{name}." for name, module in model.named_modules() if is_one(name, module))


def _norms(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Those of modules whose class says that it is a norm, wherever they are."""
    norms = _inside(model, lambda _, module: "norm" in type(module).__name__.lower())
    return [name for name in names if name.startswith(norms)]


def _biases(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Every bias, those of norms too, as in BitFit (arXiv 2106.10199)."""
    return [name for name in names if name.rpartition(".")[2] == "bias"]


def _embeddings(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Those of tokens, and of positions where they are learned."""
    tables = _inside(model, lambda _, module: isinstance(module, nn.Embedding))
    return [name for name in names if name.startswith(tables)]


def _head(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    head = model.get_output_embeddings()
    inside = _inside(model, lambda _, module: module is head)
    return [name for name in names if name.startswith(inside)]


def _attention(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """All inside attention, with the norms of heads that some families have there."""
    own = family_of(model.config).attention

    def is_attention(name: str, module: nn.Module) -> bool:
        known = bool(own) and is_class(module, (own,))
        return known or type(module).__name__.endswith("Attention")

    inside = _inside(model, is_attention)
    return [name for name in names if name.startswith(inside)]


def _mlp(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """All inside an MLP or a mixture of them; else what a decoder layer holds without any module
    around it (OPT's fc1 and fc2)."""

    def is_mlp(name: str, module: nn.Module) -> bool:
        kind = type(module).__name__.lower()
        return any(word in kind for word in ("mlp", "feedforward", "moe", "ffn"))

    def is_bare(name: str, module: nn.Module) -> bool:
        return name.rpartition(".")[0] == decoder_layer_of(name) and find_kind(module) is not None

    inside = _inside(model, is_mlp) or _inside(model, is_bare)
    return [name for name in names if name.startswith(inside)]


def _factors(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """The low-rank factors of a compressed model, without biases."""
    inside = _inside(model, lambda _, module: isinstance(module, Factored))
    return [name for name in names if name.startswith(inside) and not name.endswith(".bias")]


KINDS: Mapping[str, Callable[[PreTrainedModel, Sequence[str]], list[str]]] = {
    "norms": _norms,
    "biases": _biases,
    "embeddings": _embeddings,
    "lm_head": _head,
    "attention": _attention,
    "mlp": _mlp,
    "factors": _factors,
}
"""What a word for a kind chooses of a model's parameters, of which the names are given."""
