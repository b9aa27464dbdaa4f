"""Which tensor of a model each tensor of its files is, and what becomes of those that are none."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from graft.errors import raise_problems
from graft.model.internals import ignored_patterns, names_of_today
from graft.model.weight_files import WeightFiles
from graft.text import printable

_LISTED = 3
"""Names that a note lists of those that are left out."""


def names_in(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Return the name in the model of each tensor of its files, by its name there.

    The parts of a quantised layer go where its weight would. What has no place in the model keeps
    its own name, with the model's prefix where the other names lack it.
    """
    keys, known = list(keys), model.state_dict().keys()
    # A layer is known by its weight, so that its other parts find it too.
    weights = {f"{key[:end]}.weight" for key in keys for end in _ends(key)}
    today = names_of_today(model, {*keys, *weights}, known)
    names = {}
    for key in keys:
        names[key] = today[key]
        for end in () if today[key] in known else _ends(key):
            weight = today[f"{key[:end]}.weight"]
            if weight in known:
                names[key] = weight.removesuffix(".weight") + key[end:]
                break
    prefix = f"{model.base_model_prefix}."
    if any(name == prefix + key for key, name in names.items()):  # the base model alone was saved
        lacking = [key for key, name in names.items() if name == key and name not in known]
        names |= {key: prefix + key for key in lacking if not key.startswith(prefix)}
    return names


def _ends(name: str) -> list[int]:
    """Return where the names of the modules around a tensor end in its own, the innermost first."""
    return [place for place in range(len(name) - 1, 0, -1) if name[place] == "."]


def under_own_names(model: PreTrainedModel, files: WeightFiles) -> WeightFiles:
    """Return the tensors of the files under the names that the model has for them.

    Raises GraftError where two that are different have one place.
    """
    return files.named(names_in(model, files))


def parted(
    model: PreTrainedModel, held: Collection[str], equal: Callable[[str, str], bool]
) -> list[str]:
    """Return the tensors that config.json ties to another and the files hold as one of their own.

    held: the names in the files. equal: whether two of them are the same.
    """
    return [
        name
        for name, other in model.all_tied_weights_keys.items()
        if name in held and other in held and not equal(name, other)
    ]


def parted_note(names: Iterable[str]) -> str:
    """Return what is told of the tensors that `parted` found."""
    return (
        f"{', '.join(names)}: config.json ties it to the embedding, and the files hold another "
        "one; it is kept as it is there, and what graft writes says tie_word_embeddings false"
    )


def partners(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return for each tensor that is tied the names of all that are the same one."""
    groups: dict[str, list[str]] = {}
    for name, other in model.all_tied_weights_keys.items():
        groups.setdefault(other, [other]).append(name)
    return {name: group for group in groups.values() for name in group}


_COMPUTED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias)")
"""Tensors that older checkpoints hold and the model computes: rotary frequencies, GPT-2's masks."""


def check_unplaced(
    model: PreTrainedModel, tensors: Mapping[str, Callable[[], Tensor]]
) -> list[str]:
    """Return the names of those tensors, which have no place in the model, that it does without.

    They are what the model computes itself, zeros, and what lies beside it as a whole, such as the
    head of a reward model. tensors: what reads each. Raises GraftError for any other: inside the
    model a tensor more would change what is computed.
    """
    ignored = [re.compile(pattern) for pattern in ignored_patterns(model)]
    modules = {name for name, _ in model.named_modules() if name}
    problems, left = [], []
    for name, read in tensors.items():
        computed = _COMPUTED.fullmatch(name) or any(one.search(name) for one in ignored)
        inside = any(name[:end] in modules for end in _ends(name))
        if inside and not computed and bool(read().float().any()):
            problems.append(
                f"{printable(name)} is not zero, and the model of config.json has no such tensor"
            )
        else:
            left.append(name)
    raise_problems(problems[:20], "tensors without a place, which change what is computed")
    return left


def left_note(names: Collection[str]) -> str:
    """Return what is told of the tensors that `check_unplaced` returns."""
    some = ", ".join(sorted(names)[:_LISTED]) + (" ..." if len(names) > _LISTED else "")
    number = "1 tensor has" if len(names) == 1 else f"{len(names)} tensors have"
    return f"left out, because {number} no place in the model: {some}"
