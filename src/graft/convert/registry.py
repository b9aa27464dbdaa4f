"""The tools whose models graft reads, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.entries import Entries, Listed

if TYPE_CHECKING:
    from graft.convert.base import Reader

READERS: Entries[Reader] = Entries(
    "tool",
    {
        "gptq": Listed("graft.convert.readers.gptq:GPTQ", "GPTQ"),
        "awq": Listed("graft.convert.readers.awq:AWQ", "AWQ"),
        "auto-round": Listed("graft.convert.readers.autoround:AUTO_ROUND", "auto-round"),
        "bitsandbytes": Listed("graft.convert.readers.bitsandbytes:BITSANDBYTES", "bitsandbytes"),
        "mlx": Listed("graft.convert.readers.mlx:MLX", "MLX"),
        "gguf": Listed("graft.convert.readers.gguf_source:GGUF", "GGUF"),
        "compressed-tensors": Listed(
            "graft.convert.readers.compressed:COMPRESSED_TENSORS", "compressed-tensors"
        ),
        "torchao": Listed("graft.convert.readers.torchao:TORCHAO", "torchao"),
        "fp8": Listed("graft.convert.readers.fp8:FP8_FOLDERS", "FP8"),
        "mxfp4": Listed("graft.convert.readers.mxfp4:MXFP4", "MXFP4"),
        "modelopt": Listed("graft.convert.readers.modelopt:MODELOPT", "ModelOpt"),
        "hqq": Listed("graft.convert.readers.hqq:HQQ", "HQQ"),
        "pickled": Listed("graft.convert.readers.pickled:PICKLED", "pickled PyTorch weights"),
    },
)
