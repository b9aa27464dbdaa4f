"""How a model's weights lie in a GGUF file: names, the order of rows, Q4_1 blocks.

The writer (graft.export) and the reader (graft.model.gguf.load) share this one description.

A Q4_1 block holds 32 neighbouring weights of a row in 20 bytes: fp16 scale d, fp16 minimum m and
16 bytes of nibbles, byte j holding code j low and code j + 16 high; w = d * q + m. That is one
group of IntGroupFormat(bits=4, group_size=32), its code bytes included.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from graft.formats.base import Packed
from graft.formats.int_group import IntGroupFormat
from graft.kernels.packed.planes import PLANES, pack_codes, unpack_codes
from graft.model.families import GgufLayout, family_of

Q4_1_BLOCK = 32
Q4_1_FORMAT = IntGroupFormat(bits=4, group_size=Q4_1_BLOCK)
_Q4_1_BYTES = 20
_CODE_BYTES = 16

ROPE_PARAMETERS_KEY = "graft.rope_parameters"
"""Metadata key with the JSON of the model's llama3 rope parameters; GGUF keeps only their result,
one factor per frequency in the tensor rope_freqs.weight."""


def gguf_layout(config: PretrainedConfig) -> GgufLayout:
    """Return how the family of a model that is written as GGUF lies there."""
    layout = family_of(config).gguf
    assert layout is not None, config.model_type
    return layout


def gguf_names(config: PretrainedConfig) -> Callable[[str], str | None]:
    """Return the function from a module's name to its GGUF name; None when it has none."""
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = architectures[gguf_layout(config).architecture]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    return lambda module_name: names.get_name(module_name)


def head_dim(config: PretrainedConfig) -> int:
    """Return the width of one attention head."""
    stated = getattr(config, "head_dim", None)  # Qwen2's configuration has none
    return int(stated or config.hidden_size // config.num_attention_heads)


def key_value_heads(config: PretrainedConfig) -> int:
    """Return the number of heads that keys and values have."""
    if family_of(config).multi_query:
        if config.new_decoder_architecture:
            return int(config.num_kv_heads)
        return 1 if config.multi_query else int(config.num_attention_heads)
    stated = getattr(config, "num_key_value_heads", None)  # GPT-2's configuration has none
    return int(stated or config.num_attention_heads)


def rope_factors(config: PretrainedConfig) -> torch.Tensor | None:
    """Return what ggml divides each rotary frequency by, float32 [head_dim / 2].

    None when every frequency stays as rope_theta gives it.
    """
    rope = getattr(config, "rope_parameters", None)  # GPT-2 learns its positions
    if rope is None or rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, head_dim(config), 2, dtype=torch.float32) / head_dim(config)
    return (1.0 / rope["rope_theta"] ** exponents) / scaled


def row_order(module_name: str, config: PretrainedConfig) -> Tensor | None:
    """Return for each GGUF row of a module the Transformers row that it holds; None: the same."""
    heads = rotary_heads(module_name, config)
    if heads is not None:
        return rows_to_gguf(heads * head_dim(config), heads)
    fused = gguf_layout(config).fused_rows
    if fused and module_name.endswith(fused):
        return _grouped_rows(config)
    return None


def _grouped_rows(config: PretrainedConfig) -> Tensor:
    """Return the order of Falcon's fused rows: all queries, all keys, all values.

    Transformers has for each head of the keys its queries, its key and its value.
    """
    kv_heads, width = key_value_heads(config), head_dim(config)
    queries = config.num_attention_heads // kv_heads
    rows = torch.arange(kv_heads * (queries + 2) * width).view(kv_heads, queries + 2, width)
    return torch.cat([part.flatten() for part in rows.split([queries, 1, 1], 1)])


def rotary_heads(module_name: str, config: PretrainedConfig) -> int | None:
    """Return the number of heads of a query or key projection, None for any other module.

    Only llama.cpp's Llama rotates in another order; the other architectures keep Transformers'.
    """
    if not gguf_layout(config).paired_rotary:
        return None
    if module_name.endswith("self_attn.q_proj"):
        return int(config.num_attention_heads)
    if module_name.endswith("self_attn.k_proj"):
        return int(config.num_key_value_heads)
    return None


def rows_to_gguf(rows: int, heads: int) -> Tensor:
    """Return for each GGUF row the Transformers row that it holds.

    Transformers rotates features i and i + head_dim/2 of a head as a pair, ggml's Llama rotates
    2i and 2i + 1.
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def rows_from_gguf(rows: int, heads: int) -> Tensor:
    """Return for each Transformers row the GGUF row that holds it."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def encode_q4_1(weight_format: IntGroupFormat, packed: Packed, in_features: int) -> Tensor:
    """Return Q4_1 blocks uint8 [rows, in_features / 32 * 20] that hold the very same weights.

    For 2, 3 or 4 bits, groups of a multiple of 32, fp16 statistics and in_features a multiple of
    32; a longer group is repeated.
    """
    repeats, blocks = weight_format.group_size // Q4_1_BLOCK, in_features // Q4_1_BLOCK
    codes = packed["codes"]
    if weight_format.bits != 4:
        planes = tuple(
            packed[name]
            for name, _ in zip(("codes", "codes_high"), PLANES[weight_format.bits], strict=False)
        )
        (codes,) = pack_codes(unpack_codes(planes, weight_format.bits, in_features), 4)
    statistics = [packed[name] for name in ("scales", "offsets")]
    if repeats > 1:
        statistics = [values.repeat_interleave(repeats, -1)[:, :blocks] for values in statistics]
    halves = [values.unsqueeze(-1).view(torch.uint8) for values in statistics]
    return torch.cat([*halves, codes.unflatten(-1, (blocks, _CODE_BYTES))], -1).flatten(1)


def decode_q4_1(rows: Tensor) -> dict[str, Tensor]:
    """Return Q4_1 blocks uint8 [rows, blocks * 20] as packed tensors of Q4_1_FORMAT."""
    blocks = rows.unflatten(-1, (-1, _Q4_1_BYTES))
    return {
        "codes": blocks[..., 4:].reshape(rows.shape[0], -1).clone(),
        "scales": blocks[..., 0:2].contiguous().view(torch.float16).squeeze(-1),
        "offsets": blocks[..., 2:4].contiguous().view(torch.float16).squeeze(-1),
    }
