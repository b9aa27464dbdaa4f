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
    decoder: str = ""
    """Class of the model, where the native kernels decode it: Llama's modules and names."""
    norms_add_one: bool = False
    """Its norms multiply by 1 + weight."""
    multi_query: bool = False
    """Its keys and values have one head, unless `multi_query` or `new_decoder_architecture` of its
    configuration say otherwise, as in Falcon."""
    in_mlx: bool = False
    """mlx-lm takes its modules and weights from Transformers unchanged."""
    gguf: GgufLayout | None = None
    """None: llama.cpp's form of it is not known here."""


_ROWS = (
    Family(
        model_type="llama",
        plain_attention=True,
        norm="LlamaRMSNorm",
        gate="LlamaMLP",
        decoder="LlamaForCausalLM",
        in_mlx=True,
        gguf=GgufLayout(
            architecture="llama",
            read=True,
            paired_rotary=True,
            bias_settings={"attention_bias": "attn_q", "mlp_bias": "ffn_gate"},
        ),
    ),
    Family(
        model_type="mistral",
        plain_attention=True,
        norm="MistralRMSNorm",
        gate="MistralMLP",
        decoder="MistralForCausalLM",
        in_mlx=True,
        gguf=GgufLayout(architecture="llama", paired_rotary=True),
    ),
    Family(
        model_type="qwen2",
        plain_attention=True,
        norm="Qwen2RMSNorm",
        gate="Qwen2MLP",
        decoder="Qwen2ForCausalLM",
        in_mlx=True,
        gguf=GgufLayout(architecture="qwen2", read=True, optional_head_dim=True),
    ),
    Family(
        model_type="qwen3",
        plain_attention=True,
        norm="Qwen3RMSNorm",
        gate="Qwen3MLP",
        in_mlx=True,
        gguf=GgufLayout(
            architecture="qwen3", read=True, bias_settings={"attention_bias": "attn_q"}
        ),
    ),
    Family(
        model_type="gemma",
        plain_attention=True,
        norms_add_one=True,
        in_mlx=True,
        gguf=GgufLayout(
            architecture="gemma", read=True, settings={"hidden_activation": "gelu_pytorch_tanh"}
        ),
    ),
    Family(model_type="gpt2", plain_attention=True, gguf=GgufLayout(architecture="gpt2")),
    Family(
        model_type="falcon",
        multi_query=True,
        gguf=GgufLayout(architecture="falcon", fused_rows="self_attention.query_key_value"),
    ),
    Family(model_type="phi", in_mlx=True, gguf=GgufLayout(architecture="phi2")),
    Family(
        model_type="phi3",
        plain_attention=True,
        norm="Phi3RMSNorm",
        in_mlx=True,
        gguf=GgufLayout(architecture="phi3"),
    ),
    Family(
        model_type="granite",
        plain_attention=True,
        norm="GraniteRMSNorm",
        gate="GraniteMLP",
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
    Family(model_type="gemma3_text", plain_attention=True),
    Family(model_type="gpt_neox", plain_attention=True),
    Family(model_type="starcoder2", plain_attention=True),
)

FAMILIES = {row.model_type: row for row in _ROWS}
"""By model_type."""


def family_of(config: PreTrainedConfig) -> Family:
    """Return what is known of a model's family, which may be nothing but its name."""
    return FAMILIES.get(config.model_type) or Family(model_type=config.model_type)


def is_class(module: object, names: Collection[str]) -> bool:
    """Return whether a module is of one of these classes of Transformers.

    A model with code of its own may have a class of the same name, which is another one.
    """
    kind = type(module)
    return kind.__name__ in names and kind.__module__.startswith("transformers.models.")
