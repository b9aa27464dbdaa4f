"""auto-round folders: integers in the layers of GPTQ or AWQ, as packing_format says.

"auto_round:auto_gptq" stores zero points minus one, "auto_round" and "auto_round:gptqmodel" as they
are, and "auto_round:auto_awq" is AWQ's gemm. Floats of 4 and 8 bits are other layouts.
"""

from __future__ import annotations

from graft.convert.awq import open_awq
from graft.convert.base import Reader
from graft.convert.folder import ForeignFolder
from graft.convert.gptq import open_gptq
from graft.convert.integer_settings import check_settings
from graft.convert.source import Source
from graft.errors import GraftError
from graft.text import quoted

_METHODS = ("auto-round", "auto_round", "autoround", "intel/auto-round")
_OTHERS = ("llm_compressor", "fp8", "mx_", "mxfp", "nv_", "nvfp", "mlx", "fake", "gguf", "marlin")
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
        check_settings(str(folder.folder), settings)  # what it rounds, before how that is packed
        # Before there was a packing_format, `backend` was of both writing and reading.
        named = settings.get("packing_format") or settings.get("backend") or "auto_round:auto_gptq"
        packing = str(named).lower()
        if any(other in packing for other in _OTHERS):
            raise GraftError(
                f"{folder.folder}: packing_format is {quoted(named)}; graft reads integers of "
                "auto_round, auto_round:auto_gptq and auto_round:auto_awq: start from the "
                "unquantised model"
            )
        if "awq" in packing:
            return open_awq(folder, _TOOL, "gemm")
        is_v1 = packing == "auto" or ("gptq" in packing and "gptqmodel" not in packing)
        return open_gptq(folder, _TOOL, "v1" if is_v1 else "v2", unwrapped=True)


AUTO_ROUND = AutoRoundReader()
