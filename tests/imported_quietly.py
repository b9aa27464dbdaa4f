"""Peers that log while Transformers imports them: pytest would print that behind its summary."""

from __future__ import annotations

import importlib
import importlib.util
import logging

logging.disable(logging.WARNING)
for _name in ("torchao.quantization", "torchao.prototype.mx_formats", "hqq.core.quantize"):
    if importlib.util.find_spec(_name.partition(".")[0]):
        importlib.import_module(_name)
logging.disable(logging.NOTSET)
