"""graft fine-tunes a language model and ships exactly the weights that it trained.

    import graft

    report = graft.finetune(graft.TrainConfig(model=folder, data="rows.jsonl", out="run"))
    model, tokenizer = graft.load("run")
    graft.merge("run", "merged")
    graft.export_model("run", "gguf", "model.gguf")

Everything is imported on first use, so that `import graft` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graft.errors import GraftError

if TYPE_CHECKING:
    from graft.api.adapter.extract import extract_adapter
    from graft.api.adapter.merge import combine_adapters
    from graft.api.adapter.resize import resize_adapter
    from graft.api.adapters import (
        active_adapters,
        adapter_names,
        load_adapter,
        merge_in_memory,
        no_adapters,
        remove_adapter,
        set_adapters,
        unmerge,
    )
    from graft.api.adopt import adopt
    from graft.api.compress import compress
    from graft.api.config import CompressConfig, QuantizeConfig, TrainConfig
    from graft.api.convert import convert_model
    from graft.api.evaluate import evaluate_model, generate
    from graft.api.export import export_model
    from graft.api.finetune import finetune
    from graft.api.load import load
    from graft.api.merge import merge
    from graft.api.quantize import quantize
    from graft.api.verify import verify
    from graft.comparison.config import CompareConfig
    from graft.comparison.run import compare
    from graft.train.stop import Stop, StoppedError

_HOME = {
    "CompareConfig": "graft.comparison.config",
    "CompressConfig": "graft.api.config",
    "QuantizeConfig": "graft.api.config",
    "Stop": "graft.train.stop",
    "StoppedError": "graft.train.stop",
    "TrainConfig": "graft.api.config",
    "active_adapters": "graft.api.adapters",
    "adapter_names": "graft.api.adapters",
    "adopt": "graft.api.adopt",
    "combine_adapters": "graft.api.adapter.merge",
    "compare": "graft.comparison.run",
    "compress": "graft.api.compress",
    "convert_model": "graft.api.convert",
    "evaluate_model": "graft.api.evaluate",
    "export_model": "graft.api.export",
    "extract_adapter": "graft.api.adapter.extract",
    "finetune": "graft.api.finetune",
    "generate": "graft.api.evaluate",
    "load": "graft.api.load",
    "load_adapter": "graft.api.adapters",
    "merge": "graft.api.merge",
    "merge_in_memory": "graft.api.adapters",
    "no_adapters": "graft.api.adapters",
    "quantize": "graft.api.quantize",
    "remove_adapter": "graft.api.adapters",
    "resize_adapter": "graft.api.adapter.resize",
    "set_adapters": "graft.api.adapters",
    "unmerge": "graft.api.adapters",
    "verify": "graft.api.verify",
}

__all__ = [
    "CompareConfig",
    "CompressConfig",
    "GraftError",
    "QuantizeConfig",
    "Stop",
    "StoppedError",
    "TrainConfig",
    "active_adapters",
    "adapter_names",
    "adopt",
    "combine_adapters",
    "compare",
    "compress",
    "convert_model",
    "evaluate_model",
    "export_model",
    "extract_adapter",
    "finetune",
    "generate",
    "load",
    "load_adapter",
    "merge",
    "merge_in_memory",
    "no_adapters",
    "quantize",
    "remove_adapter",
    "resize_adapter",
    "set_adapters",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'graft' has no attribute {name!r}")
