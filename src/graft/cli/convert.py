"""`graft convert`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show, show_json
from graft.convert.config import ConvertConfig

if TYPE_CHECKING:
    from graft.api.convert import ConvertReport


@dataclass(frozen=True, kw_only=True)
class ConvertArguments(ConvertConfig):
    """What to bring in, and where to."""

    source: Positional
    """A folder or hub id of weights that another tool quantised, a folder of pickled PyTorch
    weights (they are not downloaded), a GGUF file, or one pickled file beside its config.json."""
    out: str
    """Folder to write."""
    tokenizer: str | None = None
    """Folder of the tokenizer; without it a GGUF file's own is made of what the file says."""
    json: bool = False
    """Print one JSON object instead of text."""


def convert(arguments: ConvertArguments) -> None:
    """Bring a model that another tool wrote into graft's own folder, to train, merge, export."""
    from graft.api.convert import convert_model
    from graft.cli.progress import progress

    with progress() as events:
        report = convert_model(
            arguments.source,
            arguments.out,
            tokenizer=arguments.tokenizer,
            config=ConvertConfig(
                **{one.name: getattr(arguments, one.name) for one in fields(ConvertConfig)}
            ),
            events=events,
        )
    if arguments.json:
        show_json(asdict(report) | {"path": str(report.path)})
        return
    for name, value in _lines(report).items():
        show(f"{name:<14}{value}")


def _lines(report: ConvertReport) -> dict[str, str]:
    lines = {"found": report.kind}
    if report.layers:
        formats = [f"{count} of {kind}" for kind, count in report.layers.items()]
        lines["layers"] = "; ".join(formats) + f" ({report.bits_per_weight:.2f} bits per weight)"
        lines["compared"] = _compared(report)
    elif not report.dense:
        lines["layers"] = "none is quantised"
    if report.dense:
        kinds = [f"{count} of {kind}" for kind, count in report.dense.items()]
        lines["dequantised"] = f"{'; '.join(kinds)}, written as {report.dense_dtype}"
    if report.dequantised:
        lines["to float32"] = ", ".join(report.dequantised)
    if report.left_out:
        more = " ..." if len(report.left_out) > 3 else ""
        lines["left out"] = (
            f"{len(report.left_out)} tensors without a place in the model "
            f"({', '.join(report.left_out[:3])}{more})"
        )
    lines |= {f"note {number}": note for number, note in enumerate(report.notes, start=1)}
    lines["folder"] = f"{report.path}, {report.bytes / 2**20:,.1f} MiB"
    return lines


def _compared(report: ConvertReport) -> str:
    """Return what was measured, and what was not."""
    found = (
        f"rounded to float16, which moves a weight by {report.rounding:.1e} of a step at most"
        if report.rounding
        else "equal"
    )
    return (
        "codes are copied; scales and offsets, with those that were read from the source: "
        f"{found}; no logits of another program"
    )


COMMAND = Command(arguments=ConvertArguments, run=convert)
