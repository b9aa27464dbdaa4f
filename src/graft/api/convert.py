"""Bringing a model that another tool wrote into graft's own folder."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from graft.api.events import Events
from graft.convert.config import ConvertConfig
from graft.convert.detect import open_source
from graft.convert.writer import in_words, plan_conversion, write_conversion
from graft.errors import GraftError
from graft.files.write import check_new
from graft.model.folder import read_generation_config, read_tokenizer


@dataclass(frozen=True)
class ConvertReport:
    """What was found and written."""

    path: Path
    kind: str
    """The tool or format that the weights came from."""
    layers: dict[str, int]
    """Quantised layers by format, in words; none where the weights are not quantised."""
    dense: dict[str, int]
    """Weights that were dequantised because that was asked for, by what the source holds."""
    dense_dtype: str
    """What those are now."""
    bits_per_weight: float | None
    """Of the quantised layers, scales and offsets included."""
    bytes: int
    """Size of the folder."""
    rounding: float
    """The largest change of a weight by the rounding of its scale and offset to float16, in units
    of its scale; 0.0 where every weight is the very same."""
    dequantised: tuple[str, ...]
    """What was quantised and is now float32, because it is no linear layer of the decoder."""
    left_out: tuple[str, ...]
    """Tensors that had no place in the model."""
    notes: tuple[str, ...]
    """What else was found, in words."""


def convert_model(
    source: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    config: ConvertConfig | None = None,
    events: Events | None = None,
) -> ConvertReport:
    """Write the folder `out`, which everything in graft takes as it takes its own.

    source: a folder (or hub id) of weights that a tool in `graft.convert.registry` quantised or
    pickled, a GGUF file, or one pickled file beside its config.json. tokenizer: its folder, which a
    GGUF file needs where it describes none itself. config: what to do beyond what the files say;
    with `dequantise` all weights become floats, else integers, codes and codebooks are kept.
    Nothing is quantised again.
    Raises GraftError with everything that graft cannot hold, before anything is written.
    """
    events = events or Events()
    target = Path(out)
    check_new(target)
    asked = config or ConvertConfig()
    found, folder = open_source(str(source), asked)
    words_folder = folder if tokenizer is None else Path(tokenizer)
    if tokenizer is None and found.own_tokenizer is not None:
        words = found.own_tokenizer()
        found.notes.append("the tokenizer is made of what the file says of it")
    elif tokenizer is None and not folder.is_dir():
        raise GraftError(f"{folder}: give the folder of its tokenizer too (--tokenizer)")
    else:
        words = read_tokenizer(words_folder)
        if found.check_tokenizer is not None:
            found.notes.extend(found.check_tokenizer(words))
    generation = read_generation_config(folder) or read_generation_config(words_folder)
    plan = plan_conversion(found, asked)
    write_conversion(
        plan,
        words,
        generation,
        target,
        lambda done, total: events.progress("converting", done, total),
    )
    return ConvertReport(
        path=target,
        kind=found.kind,
        layers=dict(Counter(map(in_words, plan.formats.values()))),
        dense=dict(plan.dense),
        dense_dtype=asked.dequantised_dtype,
        bits_per_weight=plan.bits_per_weight,
        bytes=sum(file.stat().st_size for file in target.iterdir()),
        rounding=found.rounding.steps,
        dequantised=tuple(plan.dequantised),
        left_out=tuple(plan.left_out),
        notes=tuple(dict.fromkeys(found.notes)),
    )
