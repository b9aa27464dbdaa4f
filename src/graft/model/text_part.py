"""The text part of a model that takes pictures or sound too, as a causal language model by itself.

Both are built by Transformers, and which tensor is which is asked of the two.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from graft.errors import GraftError
from graft.model.foreign import modules_within
from graft.model.names import names_in
from graft.understood import understood

TAKEN = frozenset(
    {
        *("aria", "deepseek_vl", "exaone4_5", "fuyu", "gemma3", "gemma4", "gemma4_unified"),
        *("got_ocr2", "idefics2", "idefics3", "internvl", "lfm2_vl", "llama4", "llava"),
        *("llava_next", "llava_next_video", "llava_onevision", "mistral3", "qwen2_5_vl"),
        *("qwen2_audio", "qwen2_vl", "qwen3_5", "qwen3_vl", "smolvlm", "video_llava", "vipllava"),
        "voxtral",
    }
)
"""The models, by model_type, whose text part was compared: on text its logits are those of the
whole model, bit for bit. Some others scale them, or look ahead in what was asked."""

_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text parts that are no causal model of Transformers, by one that computes the same on text, where
the three rotary positions of a token are one."""
_THREE_POSITIONS = ("type", "mrope_section", "mrope_interleaved")

_SENSES = ("vision", "audio", "image", "video", "speech")
"""Words in the names that configurations give their parts, where those are not text."""
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Return whether a configuration is that of a model that takes more than text."""
    senses = any(word in name for name in config.sub_configs for word in _SENSES)
    return senses or config.get_text_config() is not config


def check_text_only(config: PreTrainedConfig, folder: Path) -> None:
    """Raise GraftError for a model that takes more than text, with the way to its text part."""
    with understood(folder / "config.json"):
        if not is_multimodal(config):
            return
    kind = config.model_type
    raise GraftError(
        f"{folder} is a {kind}, which takes more than text; graft trains text alone.\n"
        + (
            f"Take its text part with: graft convert {folder} --text-part --out NEW_FOLDER"
            if kind in TAKEN
            else f"Its text part is not taken either: {_what_is_taken()}"
        )
    )


def _what_is_taken() -> str:
    return f"of those that were compared with the whole model there are {', '.join(sorted(TAKEN))}"


@dataclass(frozen=True)
class TextPart:
    """A model and its text part, both on the meta device."""

    whole: PreTrainedModel
    text: PreTrainedModel

    def names(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the name in the text part of each tensor of the whole model's files, by its name
        there; what belongs to another part is left out."""
        decoder, base = _parts(self.whole, self.text)
        inside, own = (
            _prefix(self.whole, decoder),
            "" if base is self.text else f"{self.text.base_model_prefix}.",
        )
        head = _prefix(self.whole, self.whole.get_output_embeddings())
        own_head = _prefix(self.text, self.text.get_output_embeddings())
        names = {}
        for key, name in names_in(self.whole, keys).items():
            if name.startswith(inside):
                names[key] = own + name.removeprefix(inside)
            elif name.startswith(head):
                names[key] = own_head + name.removeprefix(head)
        return names


def open_text_part(
    config: PreTrainedConfig, stated: Mapping[str, Any], folder: Path, tensors: int
) -> TextPart:
    """Return the modules of a model and of its text part.

    stated: what config.json says. tensors: how many the folder's files hold; see `modules_within`.
    Raises GraftError for a model of text alone, and for one whose text part computes something else
    by itself, or was not compared.
    """
    with understood(folder / "config.json"):
        if not is_multimodal(config):
            raise GraftError(
                f"{folder} is a {config.model_type}, which takes text alone; leave out --text-part"
            )
        if config.model_type not in TAKEN:
            raise GraftError(
                f"{folder} is a {config.model_type}, whose text part graft does not take: "
                + _what_is_taken()
            )
        kinds = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
        whole = _built(next(kind for kind in kinds if type(config) in kind), config, tensors)
        tied = bool(whole.all_tied_weights_keys)
        text = _built(MODEL_FOR_CAUSAL_LM_MAPPING, _text_config(config, stated, tied), tensors)
    decoder, base = _parts(whole, text)
    if _shapes(decoder) != _shapes(base):
        raise GraftError(f"{folder}: the text part of this {config.model_type} is no causal model")
    return TextPart(whole, text)


def _text_config(
    config: PreTrainedConfig, stated: Mapping[str, Any], tied: bool
) -> PreTrainedConfig:
    text = config.get_text_config()
    kind = _AS.get(text.model_type, text.model_type)
    settings = text.to_dict()
    for key in ("model_type", "architectures", "_name_or_path"):
        settings.pop(key, None)
    if kind != text.model_type and isinstance(settings.get("rope_parameters"), dict):
        rope = settings["rope_parameters"].items()
        settings["rope_parameters"] = {k: v for k, v in rope if k not in _THREE_POSITIONS}
    # What ends a text is often said of the whole model alone.
    settings |= {key: stated[key] for key in _TOKENS if stated.get(key) is not None}
    settings["dtype"] = settings.get("dtype") or config.dtype
    settings["tie_word_embeddings"] = tied
    return CONFIG_MAPPING[kind].from_dict(settings)


def _built(kinds: Any, config: PreTrainedConfig, tensors: int) -> PreTrainedModel:
    with modules_within(tensors), torch.device("meta"):
        model = kinds[type(config)](copy.deepcopy(config))
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def _parts(whole: PreTrainedModel, text: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """Return the modules that are the same in both: the whole text part, or all but its head."""
    decoder: nn.Module = whole.get_decoder()
    return decoder, text if type(decoder) is type(text) else text.base_model


def _prefix(model: nn.Module, part: nn.Module) -> str:
    return next(f"{name}." for name, module in model.named_modules() if module is part)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}
