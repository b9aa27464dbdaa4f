"""Reading an adapter's folder, whichever program wrote it: PEFT in either form, or mlx-lm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from graft.adapters.starts.registry import STARTS
from graft.convert.readers.pickled import pickled_tensors
from graft.errors import GraftError
from graft.files.read import read_json, typed
from graft.model.adapter_files import read_adapter_tensors, read_own_config
from graft.model.decoder_layers import decoder_layer_of
from graft.model.foreign_adapter import ForeignAdapter
from graft.model.peft_files import PEFT_CONFIG, PEFT_WEIGHTS, Finite, read_peft_config
from graft.model.peft_targets import adaptable, peft_targets
from graft.text import quoted

PEFT_PICKLE = "adapter_model.bin"
MLX_WEIGHTS = "adapters.safetensors"
_OTHERS = {
    "pytorch_lora_weights.safetensors": "diffusers, for a model of images",
    "adapters.npz": "an early mlx-lm; save it again with a newer one",
    "adapter.pt": "torchtune; save it again with its PEFT output",
}
"""Files of adapters that are not read, with whose they are."""
_OTHER_NAMES = {
    ("lora_unet_", "lora_te"): "kohya's for models of images",
    ("unet.", "text_encoder.", "transformer.single_", "transformer.transformer_blocks."): (
        "diffusers' for models of images"
    ),
}
"""Beginnings of tensors' names that say whose they are."""


def read_source(folder: Path) -> ForeignAdapter:
    """Return what the folder of an adapter holds; raises GraftError when it cannot be adopted."""
    if folder.is_file():
        raise GraftError(
            f"{folder} is a file; an adapter is a folder with {PEFT_CONFIG} and its weights"
            + ("; the PEFT folder that it was made of can be adopted" * (folder.suffix == ".gguf"))
        )
    if not folder.is_dir():
        raise GraftError(
            f"there is no folder {folder}; download an adapter of the hub first: "
            "hf download OWNER/NAME --local-dir FOLDER"
        )
    for name, whose in _OTHERS.items():
        if (folder / name).is_file() and not (folder / PEFT_WEIGHTS).is_file():
            raise GraftError(f"{folder / name} is an adapter of {whose}; it is not read")
    if not (folder / PEFT_CONFIG).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{PEFT_CONFIG}"))
        where = f"; there is one in {', '.join(map(quoted, inside[:5]))}" if inside else ""
        raise GraftError(f"{folder} is no adapter folder of PEFT: it has no {PEFT_CONFIG}{where}")
    raw = read_json(folder / PEFT_CONFIG)
    if "peft_type" not in raw and {"fine_tune_type", "lora_parameters"} & raw.keys():
        return _mlx_source(folder, raw)
    return _peft_source(folder)


def _peft_source(folder: Path) -> ForeignAdapter:
    own = read_own_config(folder)
    if own is not None and STARTS[own.init].changes_base:
        raise GraftError(
            f"{folder} is from a run of graft that started as {own.init}, and its start is not in "
            "it; use the run itself"
        )
    config = read_peft_config(folder)
    file = folder / PEFT_WEIGHTS
    if not file.is_file() and (folder / PEFT_PICKLE).is_file():
        file = folder / PEFT_PICKLE
        tensors = _floating(pickled_tensors(file), file)
    else:
        tensors = read_adapter_tensors(folder)
    for beginnings, whose in _OTHER_NAMES.items():
        if tensors and all(key.startswith(beginnings) for key in tensors):
            raise GraftError(f"{file}: its tensors are named as {whose}; it is not read")
    version = config.get("peft_version")
    return ForeignAdapter(
        folder,
        file,
        config,
        tensors,
        partial(peft_targets, config),
        f"PEFT {version}" if version else "PEFT",
        own,
    )


def _floating(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    whole = [quoted(key) for key, tensor in tensors.items() if not tensor.is_floating_point()]
    if whole:
        raise GraftError(f"{file}: {', '.join(whole[:5])} hold integers")
    return {key: tensor.float().clone() for key, tensor in tensors.items()}


# mlx-lm -------------------------------------------------------------------------------------------

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")


@dataclass(frozen=True, kw_only=True)
class _MlxUpdate:
    """What mlx-lm's lora_parameters say."""

    rank: int
    scale: Finite
    dropout: Finite = 0.0
    keys: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class _MlxConfig:
    """What of mlx-lm's adapter_config.json is read; the rest is how it trained."""

    lora_parameters: _MlxUpdate
    fine_tune_type: str = "lora"
    num_layers: int
    model: str | None = None


def _mlx_source(folder: Path, raw: Mapping[str, Any]) -> ForeignAdapter:
    """Return an adapter of `mlx_lm.lora` in PEFT's terms: its scale multiplies B A as it is."""
    kind = raw.get("fine_tune_type", "lora")
    if kind == "full":
        raise GraftError(
            f"{folder} is from mlx_lm.lora with fine_tune_type 'full': whole weights, no adapter. "
            "Fuse it (mlx_lm.fuse) and take the folder as a model"
        )
    if kind not in ("lora", "dora"):
        raise GraftError(f"{folder}: fine_tune_type is {quoted(kind)}; expected 'lora' or 'dora'")
    if "num_layers" not in raw and "lora_layers" in raw:  # its name in earlier versions
        raw = {**raw, "num_layers": raw["lora_layers"]}
    config = typed(dict(raw), _MlxConfig, folder / PEFT_CONFIG)
    update = config.lora_parameters
    if update.rank <= 0 or update.scale == 0:
        raise GraftError(f"{folder / PEFT_CONFIG}: rank {update.rank}, scale {update.scale}")
    file = folder / MLX_WEIGHTS
    tensors = _mlx_tensors(read_adapter_tensors(folder, MLX_WEIGHTS), file, kind)
    return ForeignAdapter(
        folder,
        file,
        {
            "peft_type": "LORA",
            "base_model_name_or_path": config.model,
            "r": update.rank,
            "lora_alpha": update.scale * update.rank,
            "lora_dropout": update.dropout,
            "use_dora": kind == "dora",
            "ensure_weight_tying": True,
        },
        tensors,
        partial(_mlx_targets, config),
        "mlx-lm",
    )


def _mlx_tensors(tensors: Mapping[str, Tensor], file: Path, kind: str) -> dict[str, Tensor]:
    """Return mlx-lm's tensors with PEFT's names: its factors are the transposed ones."""
    found = {}
    for key, tensor in tensors.items():
        module, _, part = key.rpartition(".")
        embedded = module.rpartition(".")[2] in _EMBEDDINGS
        if part in ("lora_a", "lora_b") and tensor.ndim == 2:
            letter = part[-1].upper()
            ending = f"lora_embedding_{letter}" if embedded else f"lora_{letter}.weight"
            found[f"{module}.{ending}"] = tensor.T.contiguous()
        elif part == "m" and tensor.ndim == 1 and not embedded:
            found[f"{module}.lora_magnitude_vector"] = tensor
        elif part in ("lora_a", "lora_b"):
            raise GraftError(
                f"{file}: {quoted(key)} {list(tensor.shape)} adapts fused experts, which is not "
                "read; fuse it with mlx_lm.fuse and take the folder as a model"
            )
        elif part == "m":
            raise GraftError(
                f"{file}: {quoted(key)} is DoRA on an embedding, which mlx-lm scales by rows; it "
                "is not read: fuse it with mlx_lm.fuse and take the folder as a model"
            )
        else:
            raise GraftError(f"{file}: {quoted(key)} is no tensor of an adapter of mlx-lm ({kind})")
    return found


def _mlx_targets(
    config: _MlxConfig, model: PreTrainedModel, as_filed: Callable[[str], str]
) -> set[str] | None:
    """Return what mlx-lm adapts: in its last blocks the layers of those keys, or all."""
    blocks = {name: decoder_layer_of(name) for name in adaptable(model)}
    last = [block for block in dict.fromkeys(blocks.values()) if block is not None]
    last = last[-max(config.num_layers, 0) :]
    keys = config.lora_parameters.keys
    chosen = set()
    for name, block in blocks.items():
        within = name[len(block) + 1 :] if block is not None and block in last else None
        if keys is None:
            chosen |= {name} if within is not None else set()
        elif within in keys or as_filed(name) in keys or name in keys:
            chosen.add(name)
    return chosen
