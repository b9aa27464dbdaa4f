"""Whether a configuration makes a causal language model, told before anything is read of it.

Transformers builds a "causal" class for masked language models and for the decoders of
encoder-decoders too, and loads their weights into it. Such a model trains, and answers nonsense.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from graft.errors import GraftError
from graft.model.text_modules import text_modules
from graft.text import listed, quoted

_OTHER_HEADS = {
    "classifies texts": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "classifies tokens": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "marks answers in a text": MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "chooses among answers": MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
}
_OTHERWISE = {
    "xlnet": "predicts tokens in any order, so that each sees later ones",
    "cpmant": "sees the whole prompt from each of its tokens",
    "reformer": "trains on texts of one length alone",
    "trocr": "reads an image through layers that no text reaches",
}
"""What families do whose modules do not say so."""
_CHOOSE = "choose a model whose architecture in config.json ends in ForCausalLM or LMHeadModel"


def check_config(config: PreTrainedConfig) -> None:
    """Raise GraftError when a configuration describes no decoder of texts, or one of more parts."""
    file, what = _file(config), _described(config)
    # A decoder that was saved by itself has layers that wait for an encoder, and says no more what
    # its class does.
    if config.is_encoder_decoder or getattr(type(config), "is_encoder_decoder", False):
        raise GraftError(
            f"{file} describes an encoder-decoder ({what}): its decoder alone, which is what "
            f"graft would train, is not the model\n{_CHOOSE}"
        )
    for does, mapping in _OTHER_HEADS.items():
        kind: Any = mapping.get(type(config), None)
        if kind is not None and kind.__name__ in _architectures(config):
            raise GraftError(
                f"{file} describes a model that {does} ({what}), not one that writes them\n"
                f"{_CHOOSE}, such as the base of this one"
            )
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise GraftError(
            f"{file} describes a model that is no causal language model of Transformers "
            f"({what})\n{_CHOOSE}"
        )


def check_attention(model: PreTrainedModel) -> None:
    """Raise GraftError when a token's prediction would see the tokens that come after it."""
    config = model.config.get_text_config()
    does = _OTHERWISE.get(config.model_type)
    if does is None:
        # What says of itself that it decodes is right; the attention inside may be of either kind.
        decodes = _said(model, "is_decoder") or _said(model, "is_causal")
        if getattr(config, "is_causal", True) is not False and decodes != {False}:
            return
        does = "attends both ways, as masked language models do, so that each token sees later ones"
    decoder = (
        '; if it was trained to see earlier tokens alone, config.json lacks "is_decoder": true'
        if getattr(config, "is_decoder", None) is False
        else ""
    )
    file, what = _file(model.config), _described(model.config)
    raise GraftError(
        f"{file} makes no causal language model: this one ({what}) {does}\n{_CHOOSE}{decoder}"
    )


def _said(model: PreTrainedModel, name: str) -> set[bool]:
    """Return the values that an attribute has in the modules that read text."""
    return {bool(getattr(part, name)) for _, part in text_modules(model) if hasattr(part, name)}


def _file(config: PreTrainedConfig) -> str:
    folder = config.name_or_path
    return str(Path(folder) / "config.json") if folder else "config.json"


def _described(config: PreTrainedConfig) -> str:
    return (
        f"model_type {quoted(config.model_type)}, architectures: {listed(_architectures(config))}"
    )


def _architectures(config: PreTrainedConfig) -> list[Any]:
    """Return the classes that the folder names, of which it may say anything."""
    named: Any = config.architectures
    return named if isinstance(named, list) else [] if named is None else [named]
