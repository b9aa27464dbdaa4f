"""What config.json says of a quantisation, beside what the tensors show."""

from __future__ import annotations

import re
from collections.abc import Collection

from graft.convert.folder import ForeignFolder
from graft.model.weight_files import WeightFiles
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


def unread(folder: ForeignFolder, known: Collection[str]) -> list[str]:
    """Return a note that names each setting of the quantisation that a reader does not know."""
    names = [quoted(key) for key in folder.settings if key not in known]
    if not names:
        return []
    return [f"config.json says of the quantisation what graft does not read: {', '.join(names)}"]
