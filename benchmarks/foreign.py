"""What other tools write, brought in and compared with what those tools compute of it themselves.

For each tool a tiny random model or adapter is written by that tool, in its usual options, brought
in with graft's own commands, and the logits of the two are compared on fixed tokens: the largest
difference as a share of the largest logit, both in float32. Each tool has a process of its own.

    python benchmarks/foreign.py                     every tool that is installed
    python benchmarks/foreign.py --tools peft mlx-lm
    python benchmarks/foreign.py --page              writes the table into docs/bring-in.md

Ends with 1 where a difference is above a case's bound, or a case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from _common import ROOT, write_csv
from _foreign_adapters import MLX_ADAPTERS, PEFT
from _foreign_gguf import LLAMA_CPP
from _foreign_models import BITSANDBYTES, MLX, TRANSFORMERS, Case
from _foreign_quantisers import AUTO_ROUND, COMPRESSED, HQQ, TORCHAO

CASES = {
    "transformers": TRANSFORMERS,
    "peft": PEFT,
    "bitsandbytes": BITSANDBYTES,
    "mlx-lm": MLX,
    "mlx-lm adapters": MLX_ADAPTERS,
    "llama.cpp": LLAMA_CPP,
    "auto-round": AUTO_ROUND,
    "hqq": HQQ,
    "compressed-tensors": COMPRESSED,
    "torchao": TORCHAO,
}
PAGE = ROOT / "docs" / "bring-in.md"
BEGIN, END = "<!-- made by benchmarks/foreign.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Row:
    """What one case gave."""

    tool: str
    case: str
    command: str
    difference: float | None
    """Largest difference of a logit, of the largest; None where it failed."""
    bound: float
    compared: str
    told: tuple[str, ...]
    """What graft printed."""
    failure: str = ""

    @property
    def failed(self) -> bool:
        return self.difference is None or not self.difference <= self.bound


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--cases", nargs="+", default=[], help="only those whose names have this")
    parser.add_argument("--page", action="store_true", help="write the table into docs/bring-in.md")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        rows = _rows(arguments.tools[0], arguments.cases)
        arguments.child.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
        return 0
    rows, skipped = [], []
    for tool in arguments.tools:
        absent = [name for name in CASES[tool].packages if not _version(name)]
        if absent:
            skipped.append(f"{tool}: needs {', '.join(absent)}")
            continue
        rows += _in_a_process(tool, arguments.cases)
    for row in rows:
        found = "failed" if row.difference is None else f"{row.difference:.1e}"
        print(f"{row.tool:<19} {row.case:<44} {found:>8}  {'WRONG' if row.failed else ''}")
        if row.failed:
            print("    " + "\n    ".join([*row.told[-6:], *row.failure.splitlines()[-6:]]))
    for line in skipped:
        print(f"skipped {line}")
    write_csv("foreign", [{k: v for k, v in asdict(row).items() if k != "told"} for row in rows])
    if arguments.page:
        _write_page(rows)
    return int(any(row.failed for row in rows))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _in_a_process(tool: str, names: list[str]) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--child", str(result), "--tools", tool]
        command += ["--cases", *names] if names else []
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if not result.is_file():
            ended = f"the process ended with {done.returncode}\n{done.stderr}"
            return [Row(tool, "all", "", None, 0.0, "", (), ended)]
        return [Row(**row) for row in json.loads(result.read_text(encoding="utf-8"))]


def _rows(tool: str, names: list[str]) -> list[Row]:
    rows = []
    for case in CASES[tool].cases:
        if not names or any(name in case.name for name in names):
            folder = Path(tempfile.mkdtemp())
            try:
                rows.append(_row(tool, case, folder))
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    return rows


def _row(tool: str, case: Case, folder: Path) -> Row:
    """Write, bring in, compare."""
    import torch
    from _foreign_models import logits_of

    import graft

    torch.set_num_threads(2)
    told: list[str] = []
    command = " && ".join(" ".join(["graft", *words]) for words in case.commands)
    difference, failure = None, ""
    try:
        torch.manual_seed(0)
        theirs = case.write(folder).float()
        for words in case.commands:
            told += _graft(folder, words)
        ours = logits_of(graft.load(folder / case.result, dtype="float32")[0], case.vocabulary)
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
    except BaseException:  # noqa: BLE001  (a row of the table, whatever a tool raises)
        failure = traceback.format_exc()
    return Row(tool, case.name, command, difference, case.bound, case.compared, (*told,), failure)


def _graft(folder: Path, words: tuple[str, ...]) -> list[str]:
    from graft.cli.main import main as graft_main

    printed = io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        code = graft_main(list(words))
    lines = [line for line in printed.getvalue().replace("\r", "\n").splitlines() if line.strip()]
    if code:
        raise RuntimeError("\n".join([f"graft {' '.join(words)} ended with {code}", *lines]))
    return lines


def _write_page(rows: list[Row]) -> None:
    """Put the table between its marks on the page."""
    lines = ["| tool | written | brought in | largest difference | compared with |"]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        found = (
            "-" if row.difference is None else f"{row.difference:.0e}" if row.difference else "0"
        )
        package = CASES[row.tool].packages[0]
        tool = f"{row.tool} {_version(package)}"
        command = f"`{row.command}`" if row.command else "as it is"
        lines.append(f"| {tool} | {row.case} | {command} | {found} | {row.compared} |")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    table = "\n".join([BEGIN, "", *lines, "", END])
    PAGE.write_text(before + table + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
