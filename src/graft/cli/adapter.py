"""`graft adapter`: what is done with adapters by themselves."""

from __future__ import annotations

from graft.cli.command import Group
from graft.entries import Entries, Listed

_SUMMARIES = {
    "extract": "make an adapter of a tuned model: the low-rank difference from its base",
    "merge": "combine adapters of one base: sum, SVD, TIES, DARE",
    "list": "list the adapters below a folder",
    "show": "show the layers of an adapter: ranks, norms, singular values",
    "compare": "show how near two adapters are, layer by layer",
    "resize": "cut an adapter to another rank",
}

COMMAND = Group(
    about="Adapters by themselves: no model is loaded, but for extract.",
    commands=Entries(
        "adapter command",
        {
            name: Listed(f"graft.cli.adapter_{name}:COMMAND", summary)
            for name, summary in _SUMMARIES.items()
        },
    ),
)
