"""What graft knows of a model family beyond what Transformers computes: one row for each.

A new family is one row here. Without one a model still loads, trains, merges and is saved, by
Transformers' own modules and PyTorch's kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Architecture:
    """What an export target computes for a family, whatever else its configuration may ask for."""

    activations: tuple[str, ...] = ("silu",)
    rope_types: tuple[str, ...] = ("default", "linear", "llama3")
    partial_rotary: bool = False
    settings: Mapping[str, bool] = field(default_factory=dict)
    """Switches of the configuration that the target does not read, as it takes them to be."""
    note: str = ""
    """What it computes a little differently, in words."""


_QKV = ("attn_q", "attn_k", "attn_v")
_EVERY_BIAS = (*_QKV, "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True, kw_only=True)
class GgufLayout:
    """How a family's weights lie in a GGUF file, and what llama.cpp calls its settings."""

    architecture: str
    """llama.cpp's name; its Llama is Mistral too, which computes the same."""
    read: bool = False
    """A file of that architecture is read as this family."""
    paired_rotary: bool = False
    """llama.cpp rotates features 2i and 2i + 1 of a head as a pair, Transformers i and
    i + head_dim/2: rows of queries and keys lie in another order."""
    fused_rows: str = ""
    """End of the name of the projection in which Transformers has for each head of the keys its
    queries, its key and its value, and llama.cpp all queries, all keys, all values."""
    optional_head_dim: bool = False
    """Its configuration has a head_dim only where that is not hidden_size / heads."""
    bias_settings: Mapping[str, str] = field(default_factory=dict)
    """Switches of its configuration, each by the layer whose bias says that it is on."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What its configuration holds and a file does not say."""
    window_every: int = 0
    """llama.cpp bounds attention by `sliding_window` in all layers but each so-manieth, if any."""
    wide_at: int = 0
    """The number of layers at which it scales scores by the width of a head as hidden_size gives
    it; at any other by head_dim. None of its files say `query_pre_attn_scalar`."""
    softcaps: bool = False
    """It bounds scores and logits by tanh, and has numbers of its own where a file has none."""
    biases: tuple[str, ...] = _QKV
    """The linear layers that llama.cpp adds a bias to, where a file has one."""
    epsilon: str = "rms_norm_eps"
    """The setting with the norms' epsilon: of an RMSNorm, or of a LayerNorm."""
    feed_forward: str = "intermediate_size"
    """The setting with the width of the MLP, which is four times the model's where it is None."""
    rotary: bool = True
    """Its positions are rotary, not learned."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is known of the models of one model_type; classes are named, not imported."""

    model_type: str
    plain_attention: bool = False
    """It leaves attention wholly to Transformers' interface. Some others ask whether it is 'sdpa'
    and do something else when it is not (sparse attention, for one)."""
    norm: str = ""
    """Class of its norms, where they compute weight * (x * scale).to(dtype); others multiply in
    another order."""
    gate: str = ""
    """Class of its MLPs, where they compute down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
    attention: str = ""
    """Class of its attention, where it computes what Llama's does: rotary positions of halves, a
    window at most, and at most a norm of each head before them."""
    decoder: str = ""
    """Class of the model, where the native kernels decode it: Llama's modules and names."""
    norms_add_one: bool = False
    """Its norms multiply by 1 + weight."""
    scales_embeddings: bool = False
    """It multiplies embeddings by sqrt(hidden_size)."""
    windowed: bool = False
    """Its `sliding_window`, where it is no None, bounds how far attention looks back."""
    multi_query: bool = False
    """Its keys and values have one head, unless `multi_query` or `new_decoder_architecture` of its
    configuration say otherwise, as in Falcon."""
    in_mlx: bool = False
    """mlx-lm takes its modules and weights from Transformers unchanged."""
    gguf: GgufLayout | None = None
    """None: llama.cpp's form of it is not known here."""
    exports: Mapping[str, Architecture] = field(default_factory=dict)
    """What each target computes for it, by the target's name; 'graph' is the decoder of plain
    operations that ONNX Runtime and OpenVINO share."""


_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""Names of GELU's approximation by tanh."""
_GELU = (*_TANH, "gelu")
_UNSCALED = ("default", "linear")
_YARN = (*_UNSCALED, "yarn")
_LLAMA3 = (*_YARN, "llama3")
_GRAPH = Architecture(("silu", "gelu_pytorch_tanh"), _LLAMA3)
_ALL = {
    "gguf": Architecture(rope_types=_LLAMA3),
    "mlx": Architecture(rope_types=_LLAMA3),
    "graph": _GRAPH,
}
_GEMMA = Architecture(("gelu_pytorch_tanh",), _UNSCALED, settings={"attention_bias": False})

_ROWS = (
    Family(
        model_type="llama",
        plain_attention=True,
        norm="LlamaRMSNorm",
        gate="LlamaMLP",
        attention="LlamaAttention",
        decoder="LlamaForCausalLM",
        in_mlx=True,
        gguf=GgufLayout(
            architecture="llama",
            read=True,
            paired_rotary=True,
            bias_settings={"attention_bias": "attn_q", "mlp_bias": "ffn_gate"},
            biases=_EVERY_BIAS,
        ),
        exports=_ALL,
    ),
    Family(
        model_type="mistral",
        plain_attention=True,
        norm="MistralRMSNorm",
        gate="MistralMLP",
        attention="MistralAttention",
        decoder="MistralForCausalLM",
        windowed=True,
        in_mlx=True,
        gguf=GgufLayout(architecture="llama", paired_rotary=True, biases=_EVERY_BIAS),
        exports=_ALL,
    ),
    Family(
        model_type="qwen2",
        plain_attention=True,
        norm="Qwen2RMSNorm",
        gate="Qwen2MLP",
        attention="Qwen2Attention",
        decoder="Qwen2ForCausalLM",
        in_mlx=True,
        gguf=GgufLayout(architecture="qwen2", read=True, optional_head_dim=True),
        exports=_ALL | {"gguf": Architecture(rope_types=_YARN)},
    ),
    Family(
        model_type="qwen3",
        plain_attention=True,
        norm="Qwen3RMSNorm",
        gate="Qwen3MLP",
        attention="Qwen3Attention",
        in_mlx=True,
        gguf=GgufLayout(
            architecture="qwen3", read=True, bias_settings={"attention_bias": "attn_q"}
        ),
        exports=_ALL | {"gguf": Architecture(rope_types=_YARN, settings={"attention_bias": False})},
    ),
    Family(
        model_type="gemma",
        plain_attention=True,
        norms_add_one=True,
        scales_embeddings=True,
        in_mlx=True,
        gguf=GgufLayout(
            architecture="gemma", read=True, settings={"hidden_activation": "gelu_pytorch_tanh"}
        ),
        exports={
            "gguf": Architecture(
                ("gelu_pytorch_tanh",),
                _YARN,
                settings={"attention_bias": False, "tie_word_embeddings": True},
            ),
            "mlx": Architecture(
                ("gelu_pytorch_tanh",),
                ("default",),
                settings={"tie_word_embeddings": True},
                note="mlx-lm computes GELU itself where the model has its approximation by tanh",
            ),
            "graph": _GRAPH,
        },
    ),
    Family(
        model_type="gemma2",
        norms_add_one=True,
        scales_embeddings=True,
        gguf=GgufLayout(architecture="gemma2", window_every=2, wide_at=46, softcaps=True),
        exports={"gguf": _GEMMA},
    ),
    Family(
        model_type="gemma3_text",
        plain_attention=True,
        norms_add_one=True,
        scales_embeddings=True,
        gguf=GgufLayout(architecture="gemma3", window_every=6, wide_at=62),
        exports={"gguf": _GEMMA},
    ),
    Family(
        model_type="gpt2",
        plain_attention=True,
        gguf=GgufLayout(
            architecture="gpt2",
            epsilon="layer_norm_epsilon",
            feed_forward="n_inner",
            rotary=False,
            biases=_EVERY_BIAS,
        ),
        exports={
            "gguf": Architecture(
                _GELU,
                ("default",),
                settings={
                    "scale_attn_weights": True,
                    "scale_attn_by_inverse_layer_idx": False,
                    "add_cross_attention": False,
                },
            )
        },
    ),
    Family(
        model_type="falcon",
        multi_query=True,
        gguf=GgufLayout(
            architecture="falcon",
            fused_rows="self_attention.query_key_value",
            epsilon="layer_norm_epsilon",
            feed_forward="ffn_hidden_size",
            biases=(),
        ),
        exports={
            "gguf": Architecture(
                _GELU,
                _UNSCALED,
                settings={"alibi": False, "parallel_attn": True, "bias": False},
            )
        },
    ),
    Family(
        model_type="phi",
        in_mlx=True,
        gguf=GgufLayout(
            architecture="phi2", epsilon="layer_norm_eps", biases=(*_EVERY_BIAS, "output")
        ),
        exports={
            "gguf": Architecture(_GELU, _UNSCALED, True, settings={"qk_layernorm": False}),
            "mlx": Architecture(
                ("gelu_new",), ("default",), True, settings={"qk_layernorm": False}
            ),
        },
    ),
    Family(
        model_type="phi3",
        plain_attention=True,
        norm="Phi3RMSNorm",
        windowed=True,
        in_mlx=True,
        gguf=GgufLayout(architecture="phi3", biases=("attn_qkv",)),
        exports={"gguf": Architecture(rope_types=("default", "longrope"), partial_rotary=True)},
    ),
    Family(
        model_type="granite",
        plain_attention=True,
        norm="GraniteRMSNorm",
        gate="GraniteMLP",
        attention="GraniteAttention",
        in_mlx=True,
    ),
    Family(
        model_type="smollm3",
        plain_attention=True,
        norm="SmolLM3RMSNorm",
        gate="SmolLM3MLP",
        in_mlx=True,
    ),
    Family(model_type="mixtral", plain_attention=True, norm="MixtralRMSNorm"),
    Family(model_type="qwen2_moe", plain_attention=True, norm="Qwen2MoeRMSNorm"),
    Family(model_type="qwen3_moe", plain_attention=True, norm="Qwen3MoeRMSNorm"),
    Family(model_type="olmo2", plain_attention=True, gate="Olmo2MLP"),
    Family(model_type="glm4", plain_attention=True, norm="Glm4RMSNorm"),
    Family(model_type="cohere", plain_attention=True),
    Family(model_type="gpt_neox", plain_attention=True),
    Family(model_type="starcoder2", plain_attention=True),
)

FAMILIES = {row.model_type: row for row in _ROWS}
"""By model_type."""


def family_of(config: PreTrainedConfig) -> Family:
    """Return what is known of a model's family, which may be nothing but its name."""
    return FAMILIES.get(config.model_type) or Family(model_type=config.model_type)


def exported(target: str) -> dict[str, Architecture]:
    """Return what a target computes, by model_type, for the families that it is known for."""
    rows = FAMILIES.items()
    return {name: family.exports[target] for name, family in rows if target in family.exports}


def is_class(module: object, names: Collection[str]) -> bool:
    """Return whether a module is of one of these classes of Transformers.

    A model with code of its own may have a class of the same name, which is another one.
    """
    kind = type(module)
    return kind.__name__ in names and kind.__module__.startswith("transformers.models.")
