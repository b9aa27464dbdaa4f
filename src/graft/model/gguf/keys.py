"""Which metadata of a GGUF file graft reads, and which would change what the model computes.

A key under the architecture's name that is neither read nor says that a feature is off is an error:
it stands for something that graft would leave out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from graft.errors import GraftError
from graft.model.gguf.file import GgufFile
from graft.text import listed, quoted

READ = frozenset(
    {
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        # How the original model was trained, which changes nothing.
        "rope.scaling.finetuned",
    }
)
"""Keys under the architecture's name that `graft.model.gguf.config` and `rope` read."""

_OFF = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.sliding_window": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
    # llama.cpp takes the tensors as they lie, whatever is said of it.
    "tensor_data_layout": ("Meta AI original pth", "reference"),
}
"""Values with which a key says that the model computes nothing beyond what its family does."""

_OTHER_MODELS = ("adapter", "clip", "diffusion", "xielu")
"""First words of keys that belong to files of another kind."""

_TOLD = ("general", "tokenizer", "quantize", "imatrix", "split", "graft")
"""First words of keys that say nothing of what the model computes, or are read elsewhere."""

_KINDS = {
    "adapter": "a LoRA adapter without its base: bring in the base, and the adapter from PEFT's "
    "files with graft adopt",
    "mmproj": "the image or audio part of a model: give the file of its language model",
    "vocab": "a tokenizer without a model",
    "imatrix": "statistics for llama.cpp's quantiser",
}


def check_kind(file: GgufFile) -> None:
    """Raise GraftError where the file says that it is something else than a model."""
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        what = _KINDS.get(kind, "no model") if isinstance(kind, str) else "no model"
        raise GraftError(f"{file.path}: general.type is {quoted(kind)}, {what}")


def key_problems(file: GgufFile, head_dim: int, context: int) -> list[str]:
    """Return every metadata key that stands for something that graft would leave out."""
    problems = []
    own = f"{file.architecture}."
    for key, value in file.metadata.items():
        first = key.partition(".")[0]
        if key.startswith(own):
            name = key.removeprefix(own)
            if name not in READ and not _is_off(name, value, head_dim, context, file):
                problems.append(_unread(key, name, value))
        elif first in _OTHER_MODELS:
            problems.append(f"metadata {key} belongs to another kind of file")
    return problems


def unknown_keys(file: GgufFile) -> list[str]:
    """Return a note on keys that nobody is known to read, where there are any."""
    words = (*_TOLD, *_OTHER_MODELS, file.architecture)
    unknown = [key for key in file.metadata if key.partition(".")[0] not in words]
    if not unknown:
        return []
    return [f"metadata that llama.cpp does not read were left out: {listed(unknown, 5)}"]


def _unread(key: str, name: str, value: Any) -> str:
    if name not in _OFF:
        return f"metadata {key} is not known here, and may change what the model computes"
    off = " or ".join(map(str, _OFF[name]))
    return f"metadata {key} is {quoted(value)}; graft computes only what {off} stands for"


def _is_off(name: str, value: Any, head_dim: int, context: int, file: GgufFile) -> bool:
    more = _OFF_BY_SIZE.get(name)
    if more is not None and _is_number(value) and more(value, head_dim, context):
        return True
    if name == "embedding_length_out":
        return bool(value in (0, file.metadata.get(f"{file.architecture}.embedding_length")))
    return any(type(value) is type(off) and value == off for off in _OFF.get(name, ()))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_OFF_BY_SIZE: dict[str, Callable[[float, int, int], bool]] = {
    "attention.scale": lambda found, width, _: math.isclose(found, width**-0.5, rel_tol=1e-6),
    "attention.sliding_window": lambda found, _, context: found >= context,
}
