"""Llama shapes, and the operations and bytes that a training step on them takes at least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig

RANK = 16
ALPHA = 32
GROUP_SIZE = 32

BYTES_PER_WEIGHT = {
    "lora": 2.0,
    "qlora": 4.127 / 8,
    "qalora": 5 / 8,
    "qalora-offsets": 5 / 8,
    "affine": 5 / 8,
    "merge_aware": 2.125,
    "merge_aware-int8": 1.25,
}
"""Of the frozen layers: bf16; nf4, doubly quantised; int4 with two fp16 per group of 32; bf16, or
8 bits with two fp16 of their own, beside those two."""


INTEGER_SHARE = 3 / 8
"""Of a product in floats, one in 7-bit integers: with AVX2, three multiplications for eight."""


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama model."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32000

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (out_features, in_features) of each linear layer of one decoder layer."""
        keys = self.hidden // self.heads * self.key_value_heads
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    def config(self) -> LlamaConfig:
        """Return the configuration that transformers builds the model from, computing in bf16."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=2048,
            use_cache=False,
            dtype="bfloat16",
        )


SHAPES = {
    "tiny": LlamaShape(128, 2, 352, 4, 2, vocabulary=512),
    "0.1b": LlamaShape(768, 12, 2048, 12, 12),
    "1.1b": LlamaShape(2048, 22, 5632, 32, 4),
    "7b": LlamaShape(4096, 32, 11008, 32, 32),
    "13b": LlamaShape(5120, 40, 13824, 40, 40),
}


def step_work(
    shape: LlamaShape, batch: int, length: int, method: str, recomputes: bool
) -> tuple[float, float]:
    """Return (operations, bytes read) that one training step takes at least.

    Counted are the frozen products forward and for the input's gradient (which the first layer's
    q, k and v need not give), the head's, causal attention (two products forward, five backward),
    what the adapter adds, and, if the decoder layers are recomputed, once more attention and the
    products that are not narrower than their inputs (keeping the others costs less memory than
    keeping their inputs). The frozen weights are read once for each product.
    """
    tokens = batch * length
    sizes = shape.linears()
    weights = shape.layers * sum(out * inner for out, inner in sizes.values())
    widths = shape.layers * sum(out + inner for out, inner in sizes.values())
    first = sum(out * inner for name, (out, inner) in sizes.items() if name[0] in "qkv")
    head = shape.vocabulary * shape.hidden
    attention = 2 * batch * length**2 * shape.hidden * shape.layers
    adapter_forward = adapter_backward = 0.0
    if method in ("lora", "qlora"):
        adapter_forward = 2.0 * tokens * RANK * widths
        adapter_backward = 2 * adapter_forward
    else:  # dyᵀ groupsum(x) for the offsets; the scales need the whole of dyᵀ x
        adapter_backward = 2.0 * tokens * weights / GROUP_SIZE
        shares = {"qalora-offsets": 0.0, "qalora": INTEGER_SHARE}
        adapter_backward += 2.0 * tokens * weights * shares.get(method, 1.0)
    operations = 2.0 * tokens * (2 * (weights + head) - first) + 3.5 * attention
    operations += adapter_forward + adapter_backward
    multiplied = 2 * weights
    if recomputes:
        again = shape.layers * sum(out * inner for out, inner in sizes.values() if out >= inner)
        operations += 2.0 * tokens * again + attention
        multiplied += again
    read = multiplied * BYTES_PER_WEIGHT[method] + 2 * 2.0 * head
    return operations, read
