"""Which tool wrote a model, from its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from graft.convert.awq import awq_source
from graft.convert.bitsandbytes import bitsandbytes_source
from graft.convert.folder import ForeignFolder, open_folder
from graft.convert.gguf_source import gguf_source
from graft.convert.gptq import gptq_source
from graft.convert.mlx import mlx_source
from graft.convert.pickled import pickled_source
from graft.convert.source import Source
from graft.errors import GraftError
from graft.model.folder import QUANTISATION_FILE, find_folder
from graft.model.weight_files import PICKLES

_BY_METHOD: dict[str | None, Callable[[ForeignFolder], Source]] = {
    "gptq": gptq_source,
    "awq": awq_source,
    "bitsandbytes": bitsandbytes_source,
    None: mlx_source,
}
_READS = "graft reads GPTQ, AWQ, bitsandbytes, MLX, GGUF and pickled PyTorch weights"


def open_source(path: str) -> tuple[Source, Path]:
    """Return what is there, and the folder of its tokenizer, for whatever kind it turns out to be.

    path: a folder, a hub id, a .gguf file, or a pickled file beside its config.json. Raises
    GraftError when it is none of the kinds that graft reads, or graft's own already.
    """
    file = Path(path)
    if file.suffix == ".gguf":
        return gguf_source(file), file
    if file.is_file():
        if f"*{file.suffix}" not in PICKLES:
            raise GraftError(f"{path} is no folder, .gguf file or PyTorch file; {_READS}")
        folder = find_folder(str(file.parent))
        return pickled_source(open_folder(folder), file.name), folder
    folder = find_folder(path)
    if (folder / QUANTISATION_FILE).is_file():
        raise GraftError(f"{folder} is in graft's own format already; use it as it is")
    found = open_folder(folder)
    safe = any(folder.glob("*.safetensors"))
    if not safe and any(path for pattern in PICKLES for path in folder.glob(pattern)):
        return pickled_source(found), folder
    settings = found.settings
    if not settings:
        raise GraftError(
            f"{folder} holds nothing to convert: its weights are not quantised, and graft takes "
            "them as they are (graft train --model, graft quantize --model)"
            if safe
            else f"{folder} holds no weights; {_READS}"
        )
    method = settings.get("quant_method")
    if method not in _BY_METHOD or (method is None and "group_size" not in settings):
        raise GraftError(
            f"{folder} is quantised by another tool ({json.dumps(settings):.100}); {_READS}: start "
            "from the unquantised model"
        )
    return _BY_METHOD[method](found), folder
