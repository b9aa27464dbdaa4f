"""What config.json says of a quantisation, beside what the tensors show."""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase

from graft.convert.folder import ForeignFolder
from graft.model.weight_files import WeightFiles
from graft.patterns import match_names
from graft.text import quoted

_RUNTIME = re.compile(
    r"(.*\.)?((input|activation|act|output|q|k|v|kv|prob|p)_(global_)?(scale|zero_point)(_ub)?"
    r"|qscale_act|scale_input)"
)
"""Statistics of inputs, outputs and caches, which are rounded by the tool's own runtime alone."""


def runtime_tensors(files: WeightFiles) -> list[str]:
    """Return the tensors that say how inputs and caches are rounded, and nothing of a weight."""
    return [key for key in files if _RUNTIME.fullmatch(key)]


def rounds_inputs(tool: str, what: str = "the inputs of quantised layers") -> str:
    """Return the note for weights whose own runtime rounds more than weights."""
    return (
        f"{tool} rounds {what} too when it computes, which graft does not: its own logits differ "
        "by that; the weights are the same"
    )


_LEFT_OUT = (
    *("ignore", "ignored_layers", "modules_to_not_convert", "llm_int8_skip_modules"),
    *("exclude_modules", "skip_modules"),
)
"""What tools call the list of layers that stay as they are."""


def unnamed(folder: ForeignFolder, plain: Collection[str]) -> list[str]:
    """Return the layers of `plain` that the settings do not name among those left out.

    A name there is a part of a layer's, a pattern with stars, or with `re:` a regular expression.
    """
    stated = [folder.settings.get(key) for key in _LEFT_OUT]
    words = [
        word
        for names in stated
        if isinstance(names, list)
        for word in names
        if isinstance(word, str) and word
    ]
    patterns = [f"{word[3:]}.*" for word in words if word.startswith("re:")]
    by_layer = {key: folder.settings.get(key) for key in ("dynamic", "extra_config")}
    for own in by_layer.values():
        for word, said in own.items() if isinstance(own, dict) else ():
            if word.startswith("-:"):  # GPTQModel's: not quantised
                patterns.append(f"{word[2:]}.*")
            elif isinstance(said, dict) and said.get("bits") == 16:
                words.append(word)
    named = {name for found in match_names(patterns, list(plain)) for name in found.names}
    named |= {
        name
        for name in plain
        for word in words
        if word in name or fnmatchcase(name, word) or name.endswith(f".{word}")
    }
    return [name for name in plain if name not in named]


def untargeted(targets: Collection[str], names: Collection[str]) -> list[str]:
    """Return the layers that no target of compressed-tensors' groups means.

    A target is a class of modules, a layer's name or the end of it, or with `re:` a regular
    expression.
    """
    if any(target.isidentifier() and target[:1].isupper() for target in targets):
        return []
    patterns = [f"{target[3:]}.*" for target in targets if target.startswith("re:")]
    meant = {name for found in match_names(patterns, list(names)) for name in found.names}
    meant |= {name for name in names for target in targets if f".{name}".endswith(f".{target}")}
    return [name for name in names if name not in meant]


def unread(folder: ForeignFolder, known: Collection[str]) -> list[str]:
    """Return a note that names each setting of the quantisation that a reader does not know."""
    names = [quoted(key) for key in folder.settings if key not in known]
    if not names:
        return []
    return [f"config.json says of the quantisation what graft does not read: {', '.join(names)}"]
