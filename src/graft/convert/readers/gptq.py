"""GPTQ folders, as AutoGPTQ, GPTQModel and auto-round write them.

A layer holds, in 32-bit words whose bits are one stream, the first code lowest:

- qweight [in_features * bits / 32, out_features]: the codes, packed along the inputs;
- qzeros [groups, out_features * bits / 32]: the zero points, packed along the outputs, minus one
  (v1, checkpoint_format "gptq") or as they are (v2, "gptq_v2"); `zero_points` finds out which;
- scales float [groups, out_features];
- g_idx [in_features]: the group of each input; neighbours share one where it is missing, or zero.

w = scale (q - zero) (GPTQ, arXiv 2210.17323), which the int format holds as scale q + offset.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial

from graft.convert.base import Reader
from graft.convert.folder import FLOATS, WORDS, ForeignFolder, check_parts, plain_tensors, size
from graft.convert.grids.affine import Grid, affine_layer, unpack_stream
from graft.convert.grids.gptq_groups import read_groups
from graft.convert.grids.integers import Rounding, width_of
from graft.convert.labels.gptq_zeros import Zeros, decide_zeros
from graft.convert.labels.integer_settings import check_settings, separate_settings
from graft.convert.labels.zero_points import WIDTHS, Version, read_zeros
from graft.convert.source import DenseLayer, QuantisedLayer, Source
from graft.errors import GraftError
from graft.model.weight_files import WeightFiles
from graft.text import quoted

_LAYOUTS: dict[str, Version] = {"gptq": "v1", "gptq_v2": "v2"}
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GptqReader(Reader):
    """Folders of AutoGPTQ and GPTQModel."""

    quant_method = "gptq"

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in a GPTQ folder; raises GraftError for layouts other than the above."""
        separate, _ = separate_settings(folder.folder)
        both = [folder.settings, separate]
        named = {
            quoted(settings[key]): _LAYOUTS.get(str(settings[key]).lower())
            for settings in both
            for key in ("checkpoint_format", "format")
            if settings.get(key)
        }
        for name, version in named.items():
            if version is None:
                raise GraftError(
                    f"{folder.folder}: checkpoint_format is {name}; graft reads "
                    f"{' and '.join(_LAYOUTS)}: save the checkpoint anew in one of them, or start "
                    "from the unquantised model"
                )
        labels = set(named.values())
        if not labels and folder.settings.get("provider") == "auto-round":
            labels = {"v1"}  # which has no word for it
        return open_gptq(folder, "GPTQ", labels.pop() if len(labels) == 1 else None)


def open_gptq(
    folder: ForeignFolder, tool: str, label: Version | None, unwrapped: bool = False
) -> Source:
    """Return what is in a folder of such layers.

    label: how its settings say that zero points are stored. unwrapped: whether the tool takes the
    largest code of v1 for 2^bits, not for 0. Raises GraftError where that is neither said nor seen.
    """
    notes = check_settings(str(folder.folder), folder.settings)
    files = folder.weights()
    names = [key.removesuffix(".qweight") for key in files if key.endswith(".qweight")]
    by_words = "gptqmodel" in json.dumps(folder.settings).lower()
    zeros = decide_zeros(files, names, folder, label, by_words, unwrapped)
    layers = _Layers(files, folder, zeros, tool, notes + zeros.notes)
    return Source(
        kind=f"{tool} ({zeros.version})",
        model=folder.skeleton(len(files)),
        layers={name: partial(layers.read, name) for name in names},
        tensors=plain_tensors(files, (f"{name}.{part}" for name in names for part in _PARTS)),
        rounding=layers.rounding,
        notes=layers.notes,
    )


@dataclass(frozen=True)
class _Layers:
    """What is known of every layer of a folder."""

    files: WeightFiles
    folder: ForeignFolder
    zeros: Zeros
    tool: str
    notes: list[str]
    rounding: Rounding = field(default_factory=Rounding)

    def read(self, name: str, out_features: int, in_features: int) -> QuantisedLayer | DenseLayer:
        """Return a layer; raises GraftError where its tensors do not fit the model."""
        files = self.files
        qweight, scales = f"{name}.qweight", f"{name}.scales"
        rows = size(files, qweight, 0)
        bits = width_of(rows, in_features, qweight, self.tool, WIDTHS)
        group_count = size(files, scales, 0)
        if out_features * bits % 32:
            raise GraftError(
                f"{name} has {out_features} outputs, whose zero points fill no whole 32-bit words; "
                "start from the unquantised model"
            )
        expected = {
            "qweight": ((in_features * bits // 32, out_features), WORDS),
            "qzeros": ((group_count, out_features * bits // 32), WORDS),
            "scales": ((group_count, out_features), FLOATS),
        }
        check_parts(files, name, expected)
        groups = read_groups(files, name, self.folder.settings, group_count, in_features)
        settings, notes = self.folder.settings, [groups.note]
        by_layer = settings.get("dynamic") or settings.get("extra_config")
        if isinstance(given := settings.get("bits"), int) and given != bits and not by_layer:
            notes.append(f"settings say {given} bits, and there are tensors of {bits}, as read")
        self.notes.extend(note for note in notes if note and note not in self.notes)

        def read() -> Grid:
            codes = unpack_stream(files.read_once(qweight).T, bits, in_features)
            zeros = read_zeros(files.read_once(f"{name}.qzeros"), bits, self.zeros.way).T
            scale = files.read_once(scales).T.double()
            return Grid(codes, scale, -scale * zeros)

        words = f"{self.tool} of {bits} bits {groups.words}"
        asked = self.folder.asked
        return affine_layer(read, words, bits, groups.of_input, asked, self.rounding)


GPTQ = GptqReader()
