"""auto-round folders: integers in the layers of GPTQ or AWQ, as packing_format says.

"auto_round:auto_gptq" stores zero points minus one, "auto_round" and "auto_round:gptqmodel" as they
are, and "auto_round:auto_awq" is AWQ's gemm. Floats of 4 and 8 bits lie as compressed-tensors has
them ("auto_round:llm_compressor").
"""

from __future__ import annotations

from dataclasses import replace

from graft.convert.base import Reader
from graft.convert.folder import ForeignFolder
from graft.convert.labels.integer_settings import check_settings
from graft.convert.labels.settings import rounds_inputs
from graft.convert.readers.awq import open_awq
from graft.convert.readers.compressed import COMPRESSED_TENSORS
from graft.convert.readers.gptq import open_gptq
from graft.convert.source import Source
from graft.errors import GraftError
from graft.text import quoted

_METHODS = ("auto-round", "auto_round", "autoround", "intel/auto-round")
_COMPRESSED = "auto_round:llm_compressor"
_OTHERS = ("fp8", "mx_", "mxfp", "nv_", "nvfp", "mlx", "fake", "gguf", "marlin", "e5m3")
_TOOL = "auto-round"


class AutoRoundReader(Reader):
    """Folders of auto-round."""

    def reads_folder(self, folder: ForeignFolder) -> bool:
        """Return whether the settings name auto-round, in one of the ways that it has had."""
        named = str(folder.settings.get("quant_method")).lower()
        return named in _METHODS and not folder.is_pickled

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in such a folder; raises GraftError for other packings than the above."""
        settings = folder.settings
        if settings.get("packing_format") == _COMPRESSED:
            return _compressed(folder)
        check_settings(str(folder.folder), settings)  # what it rounds, before how that is packed
        # Before there was a packing_format, `backend` was of both writing and reading.
        named = settings.get("packing_format") or settings.get("backend") or "auto_round:auto_gptq"
        packing = str(named).lower()
        if any(other in packing for other in _OTHERS):
            raise GraftError(
                f"{folder.folder}: packing_format is {quoted(named)}; graft reads "
                f"auto_round, auto_round:auto_gptq, auto_round:auto_awq and {_COMPRESSED}: start "
                "from the unquantised model"
            )
        if "awq" in packing:
            return open_awq(folder, _TOOL, "gemm")
        is_v1 = packing == "auto" or ("gptq" in packing and "gptqmodel" not in packing)
        return open_gptq(folder, _TOOL, "v1" if is_v1 else "v2", unwrapped=True)


def _compressed(folder: ForeignFolder) -> Source:
    """Return what is in a folder of compressed-tensors' layouts, which its own settings describe.

    Each layer's tensors say of which grid they are; the inputs of all of them are rounded too.
    """
    of_weights = {
        key: value
        for key, value in folder.settings.items()
        if not key.startswith("act_") and key not in ("data_type", "extra_config")
    }
    notes = check_settings(str(folder.folder), of_weights)
    named = {"quantization_config": {"quant_method": COMPRESSED_TENSORS.quant_method}}
    source = COMPRESSED_TENSORS.open_folder(replace(folder, config=folder.config | named))
    notes.append(rounds_inputs("the runtime of auto-round"))
    kind = f"{_TOOL} ({folder.settings.get('data_type')})"
    return replace(source, kind=kind, notes=source.notes + notes)


AUTO_ROUND = AutoRoundReader()
