"""What an adopted run keeps of where it came from: report.json and report.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from graft.api.run.layout import REPORT
from graft.files.read import read_typed
from graft.files.write import write_json
from graft.text import markdown


@dataclass(frozen=True)
class AdoptReport:
    """What was brought in, and from where."""

    adopted_from: str
    adapter_sha256: str
    """Of the adapter's tensors as they were found."""
    peft_version: str | None
    """The version of PEFT that wrote it, where it says so."""
    model: str
    method: str
    """The method of `graft train` that would have trained it; graft did not."""
    title: str
    """The method in words, with what its flags make of it."""
    layers: int
    ranks: tuple[int, ...]
    parameters: int
    """Of the adapter."""
    bits_per_weight: float | None
    """Of the quantised or adapted layers of the base."""
    versions: Mapping[str, str]
    base_name: str
    base_hub_id: str | None
    base_fingerprint: str
    base_license: Mapping[str, str]
    written_by: str = "PEFT"
    base_changes: Mapping[str, str] = field(default_factory=dict)
    """Tensors that the adapter brought for the base itself, each with how it differs; the run then
    has a base of its own."""
    tokenizer: str | None = None
    """What of the tokenizer is the adapter's and not the base's, in words."""
    notes: tuple[str, ...] = ()
    """What else is worth telling."""

    def lines(self) -> list[str]:
        """Return what was brought beside the adapter, a line for each."""
        found = [f"note: {note}" for note in self.notes]
        if self.tokenizer:
            found.append(f"tokenizer: the adapter's own; it differs in {self.tokenizer}")
        if self.base_changes:
            found.append(f"base: a copy of its own, with {changes_in_words(self.base_changes)}")
        return found


@dataclass(frozen=True, kw_only=True)
class _Changes:
    """What of report.json is asked for here, whichever version wrote it, and for whatever run."""

    base_changes: Mapping[str, str] = field(default_factory=dict)


def base_changes(run: Path) -> Mapping[str, str]:
    """Return the tensors of a run's base that came with its adapter, each with how it differs."""
    file = run / REPORT
    return read_typed(file, _Changes).base_changes if file.is_file() else {}


def changes_in_words(changes: Mapping[str, str]) -> str:
    """Return the tensors that changed, as in 'lm_head.weight (trained) and 3 more'."""
    told = [f"{name} ({how})" for name, how in list(changes.items())[:4]]
    more = len(changes) - len(told)
    return ", ".join(told) + (f" and {more} more" if more else "") + " from the adapter"


def write_adopt_report(run: Path, report: AdoptReport) -> None:
    """Write report.json and report.md into the folder of a run."""
    write_json(run / REPORT, asdict(report))
    (run / "report.md").write_text(_markdown(report), encoding="utf-8")


def _markdown(report: AdoptReport) -> str:
    bits = "-" if report.bits_per_weight is None else f"{report.bits_per_weight:.3f}"
    rows = {
        "adapter": f"{report.adopted_from}, SHA-256 {report.adapter_sha256[:16]}…",
        "written by": report.written_by,
        "layers, ranks": f"{report.layers}, {' '.join(map(str, report.ranks))}",
        "parameters": f"{report.parameters:,}",
        "bits per weight of the adapted layers": bits,
    }
    table = "\n".join(f"| {name} | {markdown(value)} |" for name, value in rows.items())
    brought = "".join(f"- {markdown(line)}\n" for line in report.lines())
    versions_line = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return (
        f"# {markdown(f'{report.title} on {Path(report.model).name}, adopted')}\n\n"
        "graft did not train this adapter: it was brought in with `graft adopt`.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        + (f"Beside the adapter:\n\n{brought}\n" if brought else "")
        + f"Base: {markdown(report.model)}.\n\nVersions: {versions_line}.\n"
    )
