"""What a model can be exported to."""

from __future__ import annotations

from typing import Literal

ExportTarget = Literal["gguf", "ollama", "mlx", "onnx", "openvino", "hf", "peft"]
