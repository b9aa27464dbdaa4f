"""The target onnx: a folder for ONNX Runtime, its integers with float zero points."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from graft.export.base import OnTensor, Origin, RuntimePackage, Target, Usage
from graft.export.onnx.runtime import OnnxRuntime
from graft.export.onnx.write import BITS, GRAPH, check_onnx_plan, export_onnx
from graft.export.runtimes import Runtime
from graft.formats.base import WeightFormat
from graft.model.load import LoadedModel


class OnnxTarget(Target):
    """See the module."""

    name = "onnx"
    stage = "writing ONNX"
    package = "onnx"
    widths = BITS
    runtime = RuntimePackage("onnxruntime", "onnxruntime")

    def problems(self, config: PretrainedConfig, weight_format: WeightFormat) -> list[str]:
        return check_onnx_plan(config, weight_format)

    def write(
        self, loaded: LoadedModel, path: Path, origin: Origin, on_tensor: OnTensor
    ) -> tuple[str, ...]:
        return export_onnx(loaded, path, on_tensor)

    def usage(self, file: str, base: str | None) -> Usage:
        return Usage(
            "In this folder, with ONNX Runtime GenAI (`pip install onnxruntime-genai`). In plain "
            "ONNX Runtime `input_ids`, `attention_mask`, `position_ids` and an empty cache go into "
            "`model.onnx`, `logits` and the longer cache come out.",
            "python",
            "import onnxruntime_genai as og\n\n"
            'model = og.Model(".")\n'
            "tokenizer = og.Tokenizer(model)\n"
            'tokenizer.update_options(add_special_tokens="true")\n'
            "options = og.GeneratorParams(model)\n"
            "options.set_search_options(max_length=64)\n"
            "generator = og.Generator(model, options)\n"
            'generator.append_tokens(tokenizer.encode("Hello"))\n'
            "while not generator.is_done():\n"
            "    generator.generate_next_token()\n"
            "print(tokenizer.decode(generator.get_sequence(0)))",
        )

    def matches(self, path: Path) -> bool:
        return (path / GRAPH).is_file()

    def load(self, path: Path, tokens: int) -> Runtime:
        return OnnxRuntime(path)


ONNX = OnnxTarget()
