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
    from graft.compare.config import CompareConfig
    from graft.compare.run import compare
    from graft.train.stop import Stop, StoppedError

_HOME = {
    "CompareConfig": "graft.compare.config",
    "CompressConfig": "graft.api.config",
    "QuantizeConfig": "graft.api.config",
    "Stop": "graft.train.stop",
    "StoppedError": "graft.train.stop",
    "TrainConfig": "graft.api.config",
    "adopt": "graft.api.adopt",
    "compare": "graft.compare.run",
    "compress": "graft.api.compress",
    "convert_model": "graft.api.convert",
    "evaluate_model": "graft.api.evaluate",
    "export_model": "graft.api.export",
    "finetune": "graft.api.finetune",
    "generate": "graft.api.evaluate",
    "load": "graft.api.load",
    "merge": "graft.api.merge",
    "quantize": "graft.api.quantize",
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
    "adopt",
    "compare",
    "compress",
    "convert_model",
    "evaluate_model",
    "export_model",
    "finetune",
    "generate",
    "load",
    "merge",
    "quantize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'graft' has no attribute {name!r}")
