"""The target ollama: a folder with a GGUF file, and a Modelfile that prompts as training did."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from graft.errors import GraftError
from graft.export.base import OnTensor, Origin, Usage
from graft.export.gguf.target import GgufTarget
from graft.export.gguf.tensors import unquantised_type
from graft.export.ollama.write import GGUF_FILE, MODELFILE, export_ollama, ollama_prompt
from graft.export.runtimes import Runtime
from graft.model.load import LoadedModel


class OllamaTarget(GgufTarget):
    """See the module; what holds of its file holds of it."""

    name = "ollama"
    suffix = ""
    library = "gguf"

    def prompt_problems(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        kind: str | None,
        separator: str,
    ) -> list[str]:
        problems = super().prompt_problems(tokenizer, config, kind, separator)
        if problems or kind is None:
            return problems
        try:
            ollama_prompt(tokenizer, config, kind, separator)
        except GraftError as error:
            return [str(error)]
        return []

    def write(
        self, loaded: LoadedModel, path: Path, origin: Origin, on_tensor: OnTensor
    ) -> tuple[str, ...]:
        return export_ollama(
            loaded,
            path,
            kind=origin.kind,
            separator=origin.separator,
            name=origin.name,
            unquantised=unquantised_type(loaded.source_dtype),
            on_tensor=lambda done, total, _: on_tensor(done, total),
        )

    def usage(self, file: str, base: str | None) -> Usage:
        return Usage(
            "In this folder:", "", "ollama create my-model -f Modelfile\nollama run my-model"
        )

    def matches(self, path: Path) -> bool:
        return (path / MODELFILE).is_file() and (path / GGUF_FILE).is_file()

    def load(self, path: Path, tokens: int) -> Runtime:
        return super().load(path / GGUF_FILE, tokens)


OLLAMA = OllamaTarget()
