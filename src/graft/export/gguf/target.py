"""The target gguf: one file for llama.cpp, in which INT layers keep their very weights as Q4_1."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from graft.errors import GraftError
from graft.export.base import OnTensor, Origin, RuntimePackage, Target, Usage
from graft.export.gguf.runtime import LlamaCpp
from graft.export.gguf.tensors import BITS, unquantised_type, without_bias
from graft.export.gguf.tokenizer import convert_tokenizer
from graft.export.gguf.write import check_gguf_plan, export_gguf
from graft.export.runtimes import Runtime
from graft.formats.base import WeightFormat
from graft.model.load import LoadedModel


class GgufTarget(Target):
    """See the module."""

    name = "gguf"
    suffix = ".gguf"
    stage = "writing GGUF"
    widths = BITS
    keeps_tokenizer = False
    runtime = RuntimePackage("llama_cpp", "llama-cpp-python")

    def problems(self, config: PretrainedConfig, weight_format: WeightFormat) -> list[str]:
        return check_gguf_plan(config, weight_format)

    def without_bias(self, config: PretrainedConfig, layers: Sequence[str]) -> list[str]:
        return without_bias(config, layers)

    def prompt_problems(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        kind: str | None,
        separator: str,
    ) -> list[str]:
        try:
            convert_tokenizer(tokenizer, config)
        except GraftError as error:
            return [str(error)]
        return []

    def write(
        self, loaded: LoadedModel, path: Path, origin: Origin, on_tensor: OnTensor
    ) -> tuple[str, ...]:
        report = export_gguf(
            loaded.model,
            loaded.tokenizer,
            path,
            unquantised=unquantised_type(loaded.source_dtype),
            name=origin.name or path.stem,
            on_tensor=lambda done, total, _: on_tensor(done, total),
        )
        return report.notes

    def usage(self, file: str, base: str | None) -> Usage:
        answer = f'Llama({json.dumps(file)})("Hello")["choices"][0]["text"]'
        program = f"from llama_cpp import Llama; print({answer})"
        return Usage(
            "With llama-cpp-python, for one; programs on llama.cpp take this file:",
            "",
            f"python -c {shlex.quote(program)}",
        )

    def matches(self, path: Path) -> bool:
        return path.suffix == self.suffix and path.is_file()

    def rounds_activations(self, loaded: LoadedModel) -> bool:
        return True  # to 8 bits

    def load(self, path: Path, tokens: int) -> Runtime:
        return LlamaCpp(path, tokens)


GGUF = GgufTarget()
