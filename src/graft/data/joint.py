"""What --separator makes of the first row, to be looked at before a training."""

from __future__ import annotations

from graft.data.config import DataConfig
from graft.data.rows import Reading, RowStream
from graft.data.shapes.base import Holds, Tokenizer
from graft.data.shapes.registry import SHAPES
from graft.text import quoted

_SHOWN = 30
"""Characters on either side."""


def joint_notes(
    config: DataConfig, tokenizer: Tokenizer, holds: tuple[Holds, ...] = ("answers",)
) -> tuple[str, ...]:
    """Return a line that shows where prompt and answer of the first row meet, if rows have both.

    Raises GraftError when there is no first row.
    """
    stream = RowStream(config.data, Reading.of(config.data, config, holds))
    row = next(iter(stream))
    shape = SHAPES[stream.kind]
    if not shape.uses_separator:
        return ()
    rendered = shape.render(row.fields, tokenizer, config.separator)
    begin, end = rendered.spans[0]
    asked = row.fields[shape.required[0]]
    before = asked if len(asked) <= _SHOWN else f"...{asked[-_SHOWN:]}"
    answer = rendered.text[begin:end]
    after = answer if len(answer) <= _SHOWN else f"{answer[:_SHOWN]}..."
    between = rendered.text[len(asked) : begin]
    joint = f"{quoted(between)} (--separator)" if between else "nothing"
    return (
        f"the first row: its prompt ends in {quoted(before)}, then comes {joint}, then the "
        f"completion: {quoted(after)}",
    )
