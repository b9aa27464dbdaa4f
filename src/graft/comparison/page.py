"""The page: one HTML file with the table and the charts, which needs no network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from graft.comparison.charts import Line, Point, bars, lines, scatter
from graft.comparison.contenders import entry_label
from graft.comparison.prepare import Prompt
from graft.comparison.results import (
    COSTS,
    MIB,
    SCORES,
    Column,
    Result,
    Row,
    training_rows,
    with_figures,
)
from graft.files.write import write_text
from graft.text import printable
from graft.train.plots import smoothed

_FAR_OFF = 3.0
"""Perplexity over the best one's from which on a model is left out of the scatter chart."""

_STYLE = """
:root { color-scheme: light dark; --fg: #1c2024; --soft: #5b646d; --bg: #fff; --line: #d9dee3;
  --raw: #a9c4de; --smooth: #1f5f99; --held: #c8442e; --fill: #3f7fb8; --bad: #a8231b;
  --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --fg: #e4e8ec; --soft: #9aa5b0; --bg: #14181c;
  --line: #343c45; --raw: #3d5873; --smooth: #7db6ec; --held: #f0826c; --fill: #5b9bd6;
  --bad: #ff8f85; --card: #1c2228; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1240px; color: var(--fg); background: var(--bg);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 8px; }
h3 { font-size: 14px; margin: 0 0 4px; }
p { margin: 4px 0 8px; } .soft { color: var(--soft); font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: 5px 9px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--bg); }
th { font-weight: 600; vertical-align: bottom; }
.error { color: var(--bad); white-space: pre-wrap; }
td.error { text-align: left; }
.best { font-weight: 700; }
.grid-of { display: flex; flex-wrap: wrap; gap: 18px; } .grid-of > div { flex: 0 1 372px; }
svg.chart { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--fg); } svg .tick { fill: var(--soft); font-size: 11px; }
svg .title { fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: .7; } .axis, .bar-line { stroke: var(--soft); }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.raw { stroke: var(--raw); stroke-width: 1; } .smooth { stroke: var(--smooth); }
.held { stroke: var(--held); } .held-mark { fill: var(--held); }
.mark, .bar { fill: var(--fill); }
.key::before { content: ""; display: inline-block; width: 18px; height: 3px; margin: 0 6px 3px 12px;
  background: var(--smooth); } .key.h::before { background: var(--held); }
.key.r::before { background: var(--raw); }
pre { background: var(--card); padding: 10px 12px; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; margin: 2px 0 12px; }
"""


@dataclass(frozen=True)
class PageContent:
    """What the page shows."""

    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    results: Sequence[Result]
    rows: Sequence[Row]
    curves: Mapping[str, Sequence[Mapping[str, Any]]]
    """Metrics of each training by its name."""
    prompts: Sequence[Prompt]


def write_page(path: Path, content: PageContent) -> None:
    """Write the page, whole or not at all."""
    write_text(path, printable(render_page(content)))


def render_page(content: PageContent) -> str:
    """Return the page; every text that comes from the user or a model is escaped."""
    settings = content.settings
    model, data = Path(str(settings["model"])).name, Path(str(settings["data"])).name
    title = f"{model} on {data}"
    sections = [_scores(content), _scatter(content), _curves(content), _costs(content)]
    sections += [_samples(content), _settings(content)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>graft compare: {escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>{escape(_about(content))}</p>{''.join(sections)}"
        "</body></html>\n"
    )


def _about(content: PageContent) -> str:
    about = content.about
    seeds = len({result.seed for result in content.results if result.seed is not None})
    words = [f"{about['steps']:,} steps of {content.settings['batch_size']} rows"] if seeds else []
    words.append(
        f"{about['training_rows']:,} training and {about['held_out_rows']:,} held-out rows"
    )
    if seeds:
        words.append(f"{seeds} seed{'s' if seeds > 1 else ''}")
    if content.prompts:
        words.append(f"{len(content.prompts)} prompts continued greedily")
    return (
        ", ".join(words) + ". Every score is that of the deployed files, read back from the disk."
    )


def _scores(content: PageContent) -> str:
    if not content.rows:
        return "<h2>Scores</h2><p>None yet.</p>"
    # A row without any figure holds its error itself.
    whole = {row.label for row in content.rows if row.mean("perplexity") is not None}
    failed = [
        f'<p class="error">{escape(result.label)}: {escape(result.error)}</p>'
        for result in content.results
        if result.error is not None and entry_label(result.contender, result.bits) in whole
    ]
    means = [row.mean("perplexity") for row in content.rows]
    best = min((value for value in means if value is not None), default=None)
    table = _table(content.rows, with_figures(SCORES, content.rows), "deployed model", best)
    return f"<h2>Scores</h2>{table}{''.join(failed)}"


def _table(
    rows: Sequence[Row], columns: Sequence[Column], what: str, best: float | None = None
) -> str:
    """Return a table in which the row of the best perplexity is bold, and errors stand for rows."""
    means = [row.mean("perplexity") for row in rows]
    head = "".join(f"<th>{escape(column.title)}</th>" for column in columns)
    body = []
    for row, perplexity in zip(rows, means, strict=True):
        cells = [f"<td>{escape(column.text(row))}</td>" for column in columns]
        if perplexity is None:
            cells = [f'<td class="error" colspan="{len(columns)}">{escape(row.errors[0])}</td>']
        name = "best" if perplexity is not None and perplexity == best else ""
        body.append(f'<tr class="{name}"><td>{escape(row.label)}</td>{"".join(cells)}</tr>')
    notes = "; ".join(f"{column.title}: {column.note}" for column in columns if column.note)
    several = any(
        figure and figure.spread for row in rows for figure in [*row.figures.values(), row.ratio]
    )
    spread = " Mean ± sample standard deviation over the seeds." if several else ""
    return (
        f'<div class="wide"><table><tr><th>{escape(what)}</th>{head}</tr>{"".join(body)}'
        f'</table></div><p class="soft">{escape(notes)}.{spread}</p>'
    )


def _scatter(content: PageContent) -> str:
    found = [(row, row.mean("file_bytes"), row.figures["perplexity"]) for row in content.rows]
    points = [
        Point(size / MIB, quality.mean, row.label, quality.spread)
        for row, size, quality in found
        if size is not None and quality is not None
    ]
    if not points:
        return ""
    best = min(point.y for point in points)
    shown = [point for point in points if point.y <= _FAR_OFF * best]
    if len(shown) < 2:
        shown = points
    off = [f"{point.label} ({point.y:.4g})" for point in points if point not in shown]
    note = f'<p class="soft">Above the chart: {escape(", ".join(off))}.</p>' if off else ""
    chart = scatter(shown, "deployed weights, MiB", "held-out perplexity")
    return (
        '<h2>Quality against file size</h2><p class="soft">Lower and further left is better.</p>'
        f"{chart}{note}"
    )


def _curves(content: PageContent) -> str:
    histories = {name: history for name, history in content.curves.items() if history}
    held = [m["eval_loss"] for history in histories.values() for m in history if "eval_loss" in m]
    raw = [m["loss"] for history in histories.values() for m in history if "loss" in m]
    finite = [loss for loss in [*held, *raw] if math.isfinite(loss)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    # The first steps fall from far above what matters later: the chart ends where most of it lies.
    high = min(high, low + 3 * (statistics.median(finite) - low) or high)
    room = 0.06 * (high - low or 1.0)
    charts = []
    for name, history in histories.items():
        steps = [(m["step"], m["loss"]) for m in history if "loss" in m]
        average = smoothed([loss for _, loss in steps])
        drawn = [
            Line(steps, "raw"),
            Line([(s, a) for (s, _), a in zip(steps, average, strict=True)], "smooth"),
            Line([(m["step"], m["eval_loss"]) for m in history if "eval_loss" in m], "held", True),
        ]
        chart = lines(drawn, "step", "loss (nats per target)", (low - room, high + room), name)
        charts.append(f"<div><h3>{escape(name)}</h3>{chart}</div>")
    return (
        '<h2>Loss in training</h2><p class="soft"><span class="key h">held-out rows</span>'
        '<span class="key">training, smoothed</span><span class="key r">training, each step</span>'
        f'</p><div class="grid-of">{"".join(charts)}</div>'
    )


def _costs(content: PageContent) -> str:
    rows = training_rows(content.results)
    if not rows:
        return ""
    charts = []
    for title, figure, words in (
        ("Time of a run, evaluations included", "training_seconds", "{:,.1f} s".format),
        ("Peak memory of the process", "peak_memory_bytes", lambda size: f"{size / MIB:,.0f} MiB"),
    ):
        means = [(row.label, row.mean(figure) or 0.0) for row in rows]
        chart = bars([(label, mean, words(mean)) for label, mean in means], title)
        charts.append(f"<div><h3>{title}</h3>{chart}</div>")
    return (
        f'<h2>What the trainings cost</h2><div class="grid-of">{"".join(charts)}</div>'
        f"{_table(rows, COSTS, 'training')}"
    )


def _samples(content: PageContent) -> str:
    if not content.prompts:
        return ""
    prompt = content.prompts[0]
    shown: dict[str, str] = {}
    for result in content.results:
        if result.texts:
            label = entry_label(result.contender, result.bits)
            shown.setdefault(label, result.texts[0])
    texts = "".join(
        f"<h3>{escape(label)}</h3><pre>{escape(text.strip()) or '(nothing)'}</pre>"
        for label, text in {"reference": prompt.reference, **shown}.items()
    )
    return (
        f"<h2>The first held-out prompt</h2><h3>prompt</h3><pre>{escape(prompt.text)}</pre>{texts}"
    )


def _settings(content: PageContent) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in content.about["versions"].items())
    lines_of = "\n".join(f"{name}: {value}" for name, value in content.settings.items())
    return (
        f"<h2>Settings</h2><details><summary>All of them</summary><pre>{escape(lines_of)}</pre>"
        f'</details><p class="soft">{escape(versions)}</p>'
    )
