"""What a model can be exported to."""

from __future__ import annotations

from typing import Annotated

from graft.export.registry import TARGETS

ExportTarget = Annotated[str, TARGETS]
"""The name of a target."""
