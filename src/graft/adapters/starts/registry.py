"""The starts by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.entries import Entries, Listed

if TYPE_CHECKING:
    from graft.adapters.starts.base import Start

STARTS: Entries[Start] = Entries(
    "start",
    {
        "default": Listed(
            "graft.adapters.starts.base:DEFAULT",
            "as no update at all: A uniform, B zero",
        ),
        "gaussian": Listed("graft.adapters.starts.gaussian:GAUSSIAN", "A normal, B zero"),
        "orthogonal": Listed(
            "graft.adapters.starts.orthogonal:ORTHOGONAL",
            "A and B drawn so that they cancel",
        ),
        "pissa": Listed(
            "graft.adapters.starts.pissa:PISSA",
            "as the principal part of the weights (arXiv 2404.02948)",
        ),
        "olora": Listed(
            "graft.adapters.starts.olora:OLORA",
            "as the first part of the weights' QR decomposition (arXiv 2406.01775)",
        ),
        "corda": Listed(
            "graft.adapters.starts.corda:CORDA",
            "as what of the weights the training text uses most (arXiv 2406.05223)",
        ),
        "eva": Listed(
            "graft.adapters.starts.eva:EVA",
            "A as the directions in which inputs vary most, ranks by them (arXiv 2410.07170)",
        ),
        "loftq": Listed(
            "graft.adapters.starts.loftq:LOFTQ",
            "as the low-rank part of what rounding takes from the weights (arXiv 2310.08659)",
        ),
    },
)
