"""Running an exported file in the runtime that it is for, one text at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from graft.errors import GraftError
from graft.export.config import ExportTarget
from graft.export.ollama.write import GGUF_FILE, MODELFILE
from graft.files import read_json
from graft.model.folder import read_config, read_tokenizer
from graft.model.gguf.layout import head_dim
from graft.model.load import load_model

PACKAGES: dict[ExportTarget, tuple[str, str]] = {
    "gguf": ("llama_cpp", "llama-cpp-python"),
    "ollama": ("llama_cpp", "llama-cpp-python"),  # its GGUF file
    "mlx": ("mlx_lm", "'mlx[cpu]' mlx-lm"),
    "onnx": ("onnxruntime", "onnxruntime"),
    "openvino": ("openvino", "openvino"),
    "hf": ("transformers", "transformers"),
}
"""The package that runs each target, and what pip installs."""


class Runtime(Protocol):
    """A model as its runtime computes it."""

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return float32 [tokens, vocabulary] of a text."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, special tokens around it included."""

    @property
    def chat_template(self) -> str | None:
        """The template that the file carries."""

    @property
    def stop_ids(self) -> set[int]:
        """The tokens that end an answer."""


def target_of(path: Path) -> ExportTarget:
    """Return which target a file or folder was exported to; raises GraftError for none of them."""
    if path.suffix == ".gguf" and path.is_file():
        return "gguf"
    if (path / MODELFILE).is_file() and (path / GGUF_FILE).is_file():
        return "ollama"
    if (path / "model.onnx").is_file():
        return "onnx"
    if (path / "openvino_model.xml").is_file():
        return "openvino"
    if (path / "model.safetensors").is_file() and (path / "config.json").is_file():
        # mlx-lm reads the rotary settings there, today's Transformers does not.
        return "mlx" if "rope_scaling" in read_json(path / "config.json") else "hf"
    raise GraftError(
        f"{path}: not a file that graft exports to a runtime; expected a .gguf file or the folder "
        "of --to ollama, mlx, onnx, openvino or hf"
    )


def start(target: ExportTarget, path: Path, tokens: int) -> Runtime:
    """Load a file in its runtime, for texts of so many tokens at most.

    Raises GraftError when the runtime is not installed or does not take the file.
    """
    module, packages = PACKAGES[target]
    if find_spec(module) is None:
        raise GraftError(
            f"{target} files run in {module}, which is not installed: pip install {packages}"
        )
    started: dict[ExportTarget, Callable[[Path, int], Runtime]] = {
        "gguf": _LlamaCpp,
        "ollama": lambda folder, tokens: _LlamaCpp(folder / GGUF_FILE, tokens),
        "mlx": _Mlx,
        "onnx": _Onnx,
        "openvino": _OpenVino,
        "hf": _Transformers,
    }
    return started[target](path, tokens)


@contextmanager
def _loading(path: Path, module: str, *errors: type[Exception]) -> Iterator[None]:
    """Say of a file that its runtime refuses, with one of these errors, that it does not load."""
    try:
        yield
    except errors as error:
        raise GraftError(f"{path}: {module} does not load it: {error}") from error


class _LlamaCpp:
    """llama.cpp, with its cache of keys and values in float32: that is no part of the file."""

    def __init__(self, path: Path, tokens: int) -> None:
        import llama_cpp

        with _loading(path, "llama_cpp", ValueError, RuntimeError):
            self._engine = llama_cpp.Llama(
                str(path),
                n_ctx=tokens,
                logits_all=True,
                flash_attn=False,
                type_k=llama_cpp.GGML_TYPE_F32,
                type_v=llama_cpp.GGML_TYPE_F32,
                verbose=False,
            )

    def logits(self, ids: Sequence[int]) -> Tensor:
        self._engine.reset()
        self._engine.eval(list(ids))
        return torch.from_numpy(np.array(self._engine.scores[: len(ids)])).float()

    def encode(self, text: str) -> list[int]:
        return list(self._engine.tokenize(text.encode(), add_bos=True, special=False))

    @property
    def chat_template(self) -> str | None:
        return self._engine.metadata.get("tokenizer.chat_template")

    @property
    def stop_ids(self) -> set[int]:
        return {self._engine.token_eos()} - {-1}


class _Folder:
    """What the folders have in common: a tokenizer that Transformers reads."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = read_tokenizer(path)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    @property
    def chat_template(self) -> str | None:
        return self._tokenizer.chat_template

    @property
    def stop_ids(self) -> set[int]:
        return {self._tokenizer.eos_token_id} - {None}


class _Transformers(_Folder):
    def __init__(self, path: Path, tokens: int) -> None:
        super().__init__(path)
        self._model = load_model(str(path), dtype="float32", device="cpu").model

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        return self._model(torch.tensor([list(ids)])).logits[0].float()


class _Mlx(_Folder):
    def __init__(self, path: Path, tokens: int) -> None:
        super().__init__(path)
        import mlx_lm

        with _loading(path, "mlx_lm", ValueError, RuntimeError, KeyError):
            self._model = mlx_lm.load(str(path))[0]

    def logits(self, ids: Sequence[int]) -> Tensor:
        import mlx.core as mx

        found = self._model(mx.array([list(ids)]))[0].astype(mx.float32)
        return torch.from_numpy(np.array(found))


class _Graph(_Folder):
    """A graph whose inputs are those of `decoder_graph`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._config = read_config(path)

    def _feeds(self, ids: Sequence[int]) -> dict[str, Any]:
        count, config = len(ids), self._config
        empty = np.zeros((1, config.num_key_value_heads, 0, head_dim(config)), np.float32)
        cache = {
            f"past_key_values.{layer}.{kind}": empty
            for layer in range(config.num_hidden_layers)
            for kind in ("key", "value")
        }
        return cache | {
            "input_ids": np.array([list(ids)], np.int64),
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count, dtype=np.int64)[None],
        }


class _Onnx(_Graph):
    def __init__(self, path: Path, tokens: int) -> None:
        super().__init__(path)
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        file = str(path / "model.onnx")
        refused = (errors.Fail, errors.InvalidProtobuf, errors.InvalidGraph)
        with _loading(path, "onnxruntime", *refused, errors.InvalidArgument, errors.NoModel):
            self._session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def logits(self, ids: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._session.run(["logits"], self._feeds(ids))[0][0])


class _OpenVino(_Graph):
    """OpenVINO, computing in float32 on every processor."""

    def __init__(self, path: Path, tokens: int) -> None:
        super().__init__(path)
        import openvino

        file = str(path / "openvino_model.xml")
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        with _loading(path, "openvino", RuntimeError):
            self._compiled = openvino.Core().compile_model(file, "CPU", settings)

    def logits(self, ids: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._compiled(self._feeds(ids))["logits"][0].copy())
