"""Loading whatever graft can load."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graft.api.run.folder import load_any
from graft.layers.narrow import widen
from graft.model.saving import saved_whole


def load(
    path: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return (model, tokenizer) of a base folder or hub id, a quantised or merged folder, or a RUN.

    The model is called like any Transformers model; a RUN's has its adapter active. A GGUF file
    that graft wrote loads too, with its own tokenizer or that of a folder. trust_remote_code runs
    Python code that a model's folder brings along.

    `save_pretrained` writes what `from_pretrained` reads as the same model: adapters are merged,
    and packed weights become float32. `graft.merge` keeps them packed.
    """
    loaded = load_any(path, dtype, device, tokenizer, trust_remote_code)
    widen(loaded.model)  # whoever gets it may train it, or take it to another dtype
    return saved_whole(loaded.model), loaded.tokenizer
