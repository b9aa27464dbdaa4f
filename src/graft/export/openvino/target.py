"""The target openvino: a folder for OpenVINO, its integers with float zero points."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from transformers import PretrainedConfig

from graft.export.base import OnTensor, Origin, RuntimePackage, Target, Usage
from graft.export.openvino.runtime import OpenVino
from graft.export.openvino.tokenizers import DETOKENIZER, PACKAGE, TOKENIZER
from graft.export.openvino.write import BITS, GRAPH, check_openvino_plan, export_openvino
from graft.export.runtimes import Runtime
from graft.formats.base import WeightFormat
from graft.model.load import LoadedModel


class OpenVinoTarget(Target):
    """See the module."""

    name = "openvino"
    stage = "writing OpenVINO"
    package = "openvino"
    widths = BITS
    runtime = RuntimePackage("openvino", "openvino")

    def problems(self, config: PretrainedConfig, weight_format: WeightFormat) -> list[str]:
        return check_openvino_plan(config, weight_format)

    def write(
        self, loaded: LoadedModel, path: Path, origin: Origin, on_tensor: OnTensor
    ) -> tuple[str, ...]:
        return export_openvino(loaded, path, on_tensor).notes

    def usage(self, file: str, base: str | None) -> Usage:
        return Usage(
            "In this folder, with OpenVINO GenAI (`pip install openvino-genai`); the hint keeps "
            "OpenVINO from computing in bf16:",
            "python",
            "import openvino_genai\n\n"
            'pipe = openvino_genai.LLMPipeline(".", "CPU", INFERENCE_PRECISION_HINT="f32")\n'
            'print(pipe.generate("Hello", max_new_tokens=64))',
        )

    def matches(self, path: Path) -> bool:
        return (path / GRAPH).is_file()

    def optional_files(self) -> dict[str, str]:
        if find_spec(PACKAGE) is not None:
            return {}
        graphs = (Path(TOKENIZER), Path(DETOKENIZER))
        why = "openvino-tokenizers, which writes it, is not installed"
        return {str(graph.with_suffix(end)): why for graph in graphs for end in (".xml", ".bin")}

    def load(self, path: Path, tokens: int) -> Runtime:
        return OpenVino(path)


OPENVINO = OpenVinoTarget()
