"""The page of `graft data`: one HTML file that needs no network and runs no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from graft.api.data import DataReport, Histogram, ShownRow
from graft.cli.data import facts, heading, shortened
from graft.files.write import write_text
from graft.model.pieces import Piece, stretches, visible
from graft.text import printable

_MOST_SHOWN = 2000
"""Tokens of a stretch that the page shows from its beginning, and as many from its end."""

_STYLE = """
:root { color-scheme: light dark; --fg: #1c2024; --soft: #5b646d; --bg: #fff; --line: #d9dee3;
  --card: #f6f8fa; --fill: #3f7fb8; --mark: #a8231b; --t1: #bfe8c4; --t2: #9fdba8; --p1: #eceff2;
  --p2: #dde2e7; --tf: #0b3d16; --sf: #7a2fa0; }
@media (prefers-color-scheme: dark) { :root { --fg: #e4e8ec; --soft: #9aa5b0; --bg: #14181c;
  --line: #343c45; --card: #1c2228; --fill: #5b9bd6; --mark: #ff8f85; --t1: #1f5a2b; --t2: #2a7138;
  --p1: #262d35; --p2: #313a44; --tf: #d8f5dd; --sf: #dba8f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1080px; color: var(--fg); background: var(--bg);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 8px; }
h3 { font-size: 14px; margin: 20px 0 6px; overflow-wrap: anywhere; }
p { margin: 4px 0 8px; } .soft { color: var(--soft); font-size: 13px; }
ul { margin: 8px 0; padding-left: 20px; } li.note { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 5px 16px 5px 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; } td:first-child { color: var(--soft); }
svg { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); } .grid { stroke: var(--line); stroke-width: .7; }
.axis { stroke: var(--soft); } .bar { fill: var(--fill); }
.most { stroke: var(--mark); stroke-dasharray: 4 3; } svg text.most-words { fill: var(--mark); }
.row { background: var(--card); padding: 10px 12px; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.75 ui-monospace, SFMono-Regular, Menlo, monospace; }
.row span, .key span { border-radius: 3px; padding: 1px 0; }
.a { background: var(--p1); } .b { background: var(--p2); }
.t.a { background: var(--t1); color: var(--tf); } .t.b { background: var(--t2); color: var(--tf); }
.s { color: var(--sf); font-weight: 700; } .t.s { color: var(--sf); }
.row .left { color: var(--soft); font-style: italic; }
.key { font: 13px/1.75 ui-monospace, SFMono-Regular, Menlo, monospace; }
.key span { padding: 1px 5px; margin-right: 4px; }
"""


def write_page(path: Path, report: DataReport) -> None:
    """Write the page, whole or not at all."""
    write_text(path, printable(render_page(report)))


def render_page(report: DataReport) -> str:
    """Return the page; every text that comes from the data or the model is escaped."""
    model, data = Path(report.model).name or report.model, Path(report.data).name
    title = f"{data} for {model}"
    rows = "".join(_row(row) for row in report.rows)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>graft data: {escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>{escape(report.kind)} rows, of which a model would be trained "
        f"on at most {report.max_length:,} tokens each.</p>{_notes(report.notes)}"
        f"<h2>In numbers</h2>{_table(report)}"
        f"<h2>Training rows by their tokens</h2>{chart(report.lengths, report.max_length)}"
        f"<h2>Rows, token by token</h2>{_KEY}{rows}</body></html>\n"
    )


_KEY = (
    '<p class="key"><span class="t a">trained</span><span class="a">not trained</span>'
    '<span class="a s">special</span></p><p class="soft">Shades tell one token from the next; '
    "the pointer on a token shows its number. White space: · is a space, ↵ a new line, ⇥ a tab.</p>"
)


def _notes(notes: Sequence[str]) -> str:
    lines = "".join(f'<li class="note">{escape(note)}</li>' for note in notes)
    return f"<h2>Worth knowing</h2><ul>{lines}</ul>" if lines else ""


def _table(report: DataReport) -> str:
    lines = "".join(
        f"<tr><td>{escape(what)}</td><td>{escape(training)}</td><td>{escape(held_out)}</td></tr>"
        for what, training, held_out in facts(report)
    )
    return (
        '<div class="wide"><table><tr><th></th><th>training</th><th>held out</th></tr>'
        f"{lines}</table></div>"
    )


def _row(row: ShownRow) -> str:
    parts = []
    for trained, some in stretches(row.pieces):
        first, left_out, last = shortened(some, _MOST_SHOWN)
        parts += [_token(piece, number, trained) for number, piece in enumerate(first)]
        if left_out:
            parts.append(f'<span class="left"> … {left_out:,} tokens … </span>')
        parts += [_token(piece, number, trained) for number, piece in enumerate(last)]
    return f'<h3>{escape(heading(row))}</h3><div class="row">{"".join(parts)}</div>'


def _token(piece: Piece, number: int, trained: bool) -> str:
    names = ["t"] * trained + ["ab"[number % 2]] + ["s"] * piece.special
    ids = ", ".join(map(str, piece.ids))
    text = escape(visible(piece.text)) or "∅"
    return f'<span class="{" ".join(names)}" title="{ids}">{text}</span>'


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 760, 240, 56, 36, 22


def chart(lengths: Histogram, max_length: int) -> str:
    """Return a histogram of lengths as SVG, with a line at the most tokens that are kept."""
    first, end, most = lengths.bars[0], lengths.bars[-1], max(lengths.counts)
    wide, high = _WIDTH - _LEFT - 12, _HEIGHT - _BOTTOM - _TOP
    base = _HEIGHT - _BOTTOM

    def x(tokens: float) -> float:
        return _LEFT + wide * (tokens - first) / (end - first)

    parts = []
    for rows in sorted({round(most / 2), most} - {0}):
        y = base - high * rows / most
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{rows:,}</text>'
        )
    for begin, after, count in zip(lengths.bars, lengths.bars[1:], lengths.counts, strict=False):
        tall = max(high * count / most, 1.0 if count else 0.0)
        parts.append(
            f'<rect class="bar" x="{x(begin) + 1:.1f}" y="{base - tall:.1f}" '
            f'width="{x(after) - x(begin) - 2:.1f}" height="{tall:.1f}">'
            f"<title>{begin:,} to {after - 1:,} tokens: {count:,} rows</title></rect>"
        )
    step = max(1, len(lengths.bars) // 8)
    parts += [
        f'<text x="{x(bar):.1f}" y="{base + 16}" text-anchor="middle">{bar:,}</text>'
        for bar in lengths.bars[::step]
    ]
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{base}" y2="{base}"/>'
        f'<text x="{_LEFT + wide / 2:.1f}" y="{_HEIGHT - 4}" text-anchor="middle">tokens</text>'
    )
    if max_length <= end:
        at, anchor = x(max_length), "end" if x(max_length) > _WIDTH / 2 else "start"
        shift = -6 if anchor == "end" else 6
        parts.append(
            f'<line class="most" x1="{at:.1f}" x2="{at:.1f}" y1="6" y2="{base}"/>'
            f'<text class="most-words" x="{at + shift:.1f}" y="14" text-anchor="{anchor}">'
            f"at most {max_length:,}</text>"
        )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" style="max-width:{_WIDTH}px" role="img" '
        f'aria-label="How many training rows have how many tokens">{"".join(parts)}</svg>'
    )
