"""Draw the README's picture of deployed quality from the table in benchmarks/quality.md.

    python scripts/draw_readme_picture.py

reads the perplexities over unquantised LoRA (in brackets in the table of one model and task) and
writes docs/images/deployed-quality.png. The same table and matplotlib give the same bytes.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "quality.md"
SECTION = "babyllama-361-1m, e2e, 300 steps"
PICTURE = ROOT / "docs" / "images" / "deployed-quality.png"

BITS = (4, 3, 2)
TOP = 12.5  # per cent; what is above leaves the picture
GAP = 0.06  # between a line's end and its name, where two widths are 1 apart
TEXT, MUTED, GRID = "#1f2328", "#57606a", "#d8dee4"
AFTER, INSIDE = "#c2571a", "#0b61a4"  # rounded after training; trained as it is deployed

Ratios = Mapping[str, tuple[float, ...]]
"""Perplexity over that of unquantised LoRA, by contender, at each of BITS."""


@dataclass(frozen=True)
class Line:
    """How a contender of the table is drawn."""

    contender: str
    label: str
    colour: str
    marker: str
    dashes: str = "-"
    nudge: float = 0.0
    """Per cent by which its label is moved, so that two labels do not touch."""


LINES = (
    Line("lora+rtn", "LoRA, then round to nearest", AFTER, "v", ":"),
    Line("qlora+gptq", "QLoRA, then GPTQ", AFTER, "s", "--"),
    Line("lora+gptq", "LoRA, then GPTQ", AFTER, "o", "--"),
    Line("lora+qep", "LoRA, then QEP", AFTER, "D", "--"),
    Line("qalora", "qalora", INSIDE, "s", nudge=0.35),
    Line("affine", "affine", INSIDE, "D", nudge=-0.1),
    Line("merge_aware", "merge_aware", INSIDE, "o", nudge=-0.25),
)


def read_ratios(page: str, section: str) -> Ratios:
    """Return the ratios in brackets of a section's table, for contenders that have all widths."""
    match = re.search(
        rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE
    )
    if match is None:
        raise SystemExit(f"{TABLE}: no section '{section}'")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in match.group(1).splitlines()
        if line.startswith("|")
    ]
    columns = [rows[0].index(f"{bits} bits") for bits in BITS]
    ratios = {}
    for row in rows[2:]:
        found = [re.search(r"\((\d+\.\d+)\)", row[column]) for column in columns]
        if all(found):
            ratios[row[0]] = tuple(float(one.group(1)) for one in found if one)
    return ratios


def draw_line(axes: Axes, line: Line, ratios: Ratios) -> None:
    """Draw one contender and its name at the right end, or where it leaves the picture."""
    heights = [100 * (ratio - 1) for ratio in ratios[line.contender]]
    axes.plot(
        range(len(BITS)),
        heights,
        line.dashes,
        color=line.colour,
        marker=line.marker,
        markersize=7,
        linewidth=2.4,
    )
    style = {"color": line.colour, "fontsize": 12, "fontweight": "bold", "va": "center"}
    if heights[-1] <= TOP:
        axes.text(len(BITS) - 1 + GAP, heights[-1] + line.nudge, line.label, **style)
        return
    slope = heights[-1] - heights[-2]
    leaves = len(BITS) - 2 + (TOP - heights[-2]) / slope
    style |= {"ha": "right", "va": "top", "bbox": {"facecolor": "white", "linewidth": 0, "pad": 3}}
    axes.text(leaves - 0.05, TOP - 0.2, f"{line.label}\n(+{heights[-1]:.0f} % at 2 bits)", **style)


def draw(ratios: Ratios, path: Path) -> None:
    """Draw all lines and write the PNG."""
    pyplot.rcParams["font.family"] = "DejaVu Sans"  # comes with matplotlib
    figure, axes = pyplot.subplots(figsize=(10, 5.2), facecolor="white")
    for line in LINES:
        draw_line(axes, line, ratios)
    axes.set_xlim(-0.12, len(BITS) - 0.98)
    axes.set_ylim(-0.6, TOP)
    axes.set_xticks(range(len(BITS)), [f"{bits} bits" for bits in BITS], fontsize=13)
    axes.set_yticks(range(0, 13, 2))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"+{value:.0f} %" if value else "0 %")
    )
    axes.tick_params(length=0, colors=TEXT, labelsize=12)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axhline(0, color=TEXT, linewidth=1.2)
    axes.text(len(BITS) - 1 + GAP, 0, "unquantised LoRA", color=TEXT, fontsize=12, va="center")
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    figure.text(
        0.02, 0.945, "Perplexity of the deployed file, above that of unquantised LoRA",
        fontsize=15.5, fontweight="bold", color=TEXT,
    )  # fmt: skip
    exact = "trained as it is deployed, merged exactly"
    kinds = [
        Line2D([], [], color=AFTER, linestyle="--", linewidth=2.4, label="rounded after training"),
        Line2D([], [], color=INSIDE, linewidth=2.4, label=exact),
    ]
    figure.legend(
        handles=kinds,
        loc="upper left",
        bbox_to_anchor=(0.01, 0.945),
        ncols=2,
        fontsize=13,
        labelcolor="linecolor",
        frameon=False,
        borderaxespad=0.2,
    )
    figure.text(
        0.02, 0.02,
        "1 M-parameter Llama on E2E NLG, 300 steps, INT weights in groups of 32, "
        "means of three seeds. Lower is better.",
        fontsize=10.5, color=MUTED,
    )  # fmt: skip
    figure.subplots_adjust(left=0.075, right=0.78, top=0.84, bottom=0.13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    draw(read_ratios(TABLE.read_text(encoding="utf-8"), SECTION), arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
