"""The tools whose models graft reads, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.entries import Entries, Listed

if TYPE_CHECKING:
    from graft.convert.base import Reader

READERS: Entries[Reader] = Entries(
    "tool",
    {
        "gptq": Listed("graft.convert.gptq:GPTQ", "GPTQ"),
        "awq": Listed("graft.convert.awq:AWQ", "AWQ"),
        "auto-round": Listed("graft.convert.autoround:AUTO_ROUND", "auto-round"),
        "bitsandbytes": Listed("graft.convert.bitsandbytes:BITSANDBYTES", "bitsandbytes"),
        "mlx": Listed("graft.convert.mlx:MLX", "MLX"),
        "gguf": Listed("graft.convert.gguf_source:GGUF", "GGUF"),
        "compressed-tensors": Listed(
            "graft.convert.compressed:COMPRESSED_TENSORS", "compressed-tensors"
        ),
        "torchao": Listed("graft.convert.torchao:TORCHAO", "torchao"),
        "fp8": Listed("graft.convert.fp8:FP8_FOLDERS", "FP8"),
        "mxfp4": Listed("graft.convert.mxfp4:MXFP4", "MXFP4"),
        "modelopt": Listed("graft.convert.modelopt:MODELOPT", "ModelOpt"),
        "hqq": Listed("graft.convert.hqq:HQQ", "HQQ"),
        "pickled": Listed("graft.convert.pickled:PICKLED", "pickled PyTorch weights"),
    },
)
