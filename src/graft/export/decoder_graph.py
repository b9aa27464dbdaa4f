"""A decoder of the Llama family as a graph of plain operations, written once for every runtime.

`DecoderGraph.build` walks the model and calls the operations of a `GraphOps`, which a runtime's
file implements (`onnx/write.py`, `openvino/write.py`). Inputs are input_ids, attention_mask and
position_ids, the output is logits; where the cache of keys and values lies is the runtime's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft.export.layers import activation, require_finite
from graft.layers.frozen import FrozenLinear
from graft.model.families import family_of
from graft.model.gguf.layout import head_dim

Node = Any
"""A value in the graph of whatever runtime."""
Size = int | Node


class GraphOps(Protocol):
    """The operations that a decoder is made of; names are those of the modules, for readers."""

    def ids(self, name: str, sizes: tuple[str, str]) -> Node:
        """Return an int64 input [sizes]."""

    def cached(self, layer: int, kind: str, new: Node, heads: int, width: int) -> Node:
        """Return a layer's past keys or values (`kind`), float32 [batch, heads, past, width], with
        the new ones behind them, and keep them for the next tokens.
        """

    def logits(self, value: Node) -> None:
        """Make a value the output."""

    def constant(self, name: str, value: Tensor) -> Node:
        """Return a small constant."""

    def rows(self, name: str, table: Tensor, ids: Node) -> Node:
        """Return the rows of an embedding table at the ids."""

    def dense(self, name: str, x: Node, weight: Tensor | FrozenLinear) -> Node:
        """Return x Wᵀ for an unquantised weight [out, in]; a table of `rows` is not kept twice."""

    def quantised(self, name: str, x: Node, layer: FrozenLinear) -> Node:
        """Return x Wᵀ for a layer in the int format."""

    def add(self, a: Node, b: Node) -> Node:
        """Return a + b."""

    def multiply(self, a: Node, b: Node) -> Node:
        """Return a * b."""

    def matmul(self, a: Node, b: Node, transposed: bool = False) -> Node:
        """Return a b, or a bᵀ, over the last two dimensions."""

    def reciprocal_root(self, x: Node) -> Node:
        """Return 1 / sqrt(x)."""

    def mean_square(self, x: Node) -> Node:
        """Return mean(x²) over the last dimension, which stays with size 1."""

    def unary(self, kind: str, x: Node) -> Node:
        """Return cos, sin, sigmoid or tanh of x."""

    def softmax(self, x: Node) -> Node:
        """Return the softmax over the last dimension."""

    def reshape(self, x: Node, sizes: Sequence[Size]) -> Node:
        """Return x with other sizes; 0 keeps that of the same place, -1 is the one left over."""

    def transpose(self, x: Node, order: Sequence[int]) -> Node:
        """Return x with its dimensions in that order."""

    def concat(self, parts: Sequence[Node], axis: int) -> Node:
        """Return the parts one after another."""

    def part(self, x: Node, start: int, stop: int) -> Node:
        """Return x[..., start:stop]."""

    def size(self, x: Node, axis: int) -> Node:
        """Return a size of x as int64 [1]."""

    def visible(self, mask: Node, tokens: Node, total: Node, window: int | None) -> Node:
        """Return float32 [batch, 1, tokens, total]: 0 where token i of the last `tokens`, which is
        at p = total - tokens + i, may see position j: j <= p, with a window j > p - window, and the
        mask there is 1; else the smallest float.
        """

    def as_float(self, ids: Node) -> Node:
        """Return int64 ids as float32."""


class DecoderGraph:
    """Builds the graph of one model over the operations of one runtime."""

    def __init__(self, model: PreTrainedModel, ops: GraphOps) -> None:
        config = model.config
        self._model, self._ops, self._config = model, ops, config
        self._heads, self._width = int(config.num_attention_heads), head_dim(config)
        self._groups = int(config.num_key_value_heads)
        self._family = family_of(config)

    def build(self) -> None:
        """Add every operation, from the ids to the logits."""
        ops, decoder = self._ops, self._model.get_submodule("model")
        ids = ops.ids("input_ids", ("batch", "tokens"))
        mask = ops.ids("attention_mask", ("batch", "total"))
        positions = ops.ids("position_ids", ("batch", "tokens"))
        self._tokens, self._total = ops.size(ids, 1), ops.size(mask, 1)
        window = self._config.sliding_window if self._family.windowed else None
        self._visible = ops.visible(mask, self._tokens, self._total, window)
        self._cos, self._sin = self._rotary(positions, decoder.get_submodule("rotary_emb"))
        hidden = ops.rows("model.embed_tokens", self._embedding(), ids)
        if self._family.scales_embeddings:
            scale = torch.tensor(float(self._config.hidden_size) ** 0.5)
            hidden = ops.multiply(hidden, ops.constant("embedding_scale", scale))
        layers = list(decoder.get_submodule("layers").children())
        for index, layer in enumerate(layers):
            hidden = self._layer(hidden, layer, index)
        hidden = self._norm(hidden, decoder.get_submodule("norm"), "model.norm")
        head = self._model.get_output_embeddings()
        assert head is not None
        ops.logits(self._linear(hidden, head, "lm_head"))

    def _embedding(self) -> Tensor:
        return self._model.get_input_embeddings().get_parameter("weight")

    def _rotary(self, positions: Node, module: nn.Module) -> tuple[Node, Node]:
        """Return cos and sin [batch, 1, tokens, head_dim]."""
        ops = self._ops
        rates = torch.as_tensor(module.inv_freq).detach().float()
        column = ops.reshape(ops.as_float(positions), (0, 1, -1, 1))
        angles = ops.multiply(column, ops.constant("inv_freq", torch.cat([rates, rates])))
        factor = ops.constant("rope_scale", torch.tensor(float(module.attention_scaling)))  # type: ignore[arg-type]
        cos, sin = (ops.multiply(ops.unary(kind, angles), factor) for kind in ("cos", "sin"))
        return cos, sin

    def _layer(self, hidden: Node, layer: nn.Module, index: int) -> Node:
        ops, name = self._ops, f"model.layers.{index}"
        normed = self._norm(hidden, layer.get_submodule("input_layernorm"), f"{name}.input_norm")
        attention = layer.get_submodule("self_attn")
        hidden = ops.add(hidden, self._attention(normed, attention, index, f"{name}.self_attn"))
        norm = layer.get_submodule("post_attention_layernorm")
        normed = self._norm(hidden, norm, f"{name}.post_norm")
        return ops.add(hidden, self._mlp(normed, layer.get_submodule("mlp"), f"{name}.mlp"))

    def _attention(self, x: Node, module: nn.Module, index: int, name: str) -> Node:
        """Each of the cache's heads serves heads/groups queries, which lie one after another."""
        ops, width, groups = self._ops, self._width, self._groups
        shared = self._heads // groups
        query, key, value = (
            self._split(
                self._linear(x, module.get_submodule(part), f"{name}.{part}"),
                heads,
                getattr(module, f"{part[0]}_norm", None),
                f"{name}.{part[0]}_norm",
            )
            for part, heads in (("q_proj", self._heads), ("k_proj", groups), ("v_proj", groups))
        )
        query, key = self._rotated(query), self._rotated(key)
        key, value = (
            ops.cached(index, kind, new, groups, width)
            for kind, new in (("key", key), ("value", value))
        )
        query = ops.reshape(query, (0, groups, -1, width))
        scale = ops.constant(f"{name}.scale", torch.tensor(float(module.scaling)))  # type: ignore[arg-type]
        scores = ops.multiply(ops.matmul(query, key, transposed=True), scale)
        five = (0, groups, shared, self._tokens, self._total)
        visible = ops.reshape(self._visible, (0, 1, 1, self._tokens, self._total))
        weights = ops.softmax(ops.add(ops.reshape(scores, five), visible))
        weights = ops.reshape(weights, (0, groups, -1, self._total))
        context = ops.reshape(ops.matmul(weights, value), (0, self._heads, -1, width))
        context = ops.reshape(ops.transpose(context, (0, 2, 1, 3)), (0, 0, self._heads * width))
        return self._linear(context, module.get_submodule("o_proj"), f"{name}.o_proj")

    def _split(self, x: Node, heads: int, norm: nn.Module | None, name: str) -> Node:
        """Return [batch, heads, tokens, head_dim], normalised head by head where the model does."""
        x = self._ops.reshape(x, (0, 0, heads, self._width))
        if norm is not None:
            x = self._norm(x, norm, name)
        return self._ops.transpose(x, (0, 2, 1, 3))

    def _rotated(self, x: Node) -> Node:
        """Return x cos + (-second half, first half) sin."""
        ops, half = self._ops, self._width // 2
        minus = ops.constant("minus", torch.tensor(-1.0))
        turned = [ops.multiply(ops.part(x, half, 2 * half), minus), ops.part(x, 0, half)]
        return ops.add(ops.multiply(x, self._cos), ops.multiply(ops.concat(turned, -1), self._sin))

    def _mlp(self, x: Node, module: nn.Module, name: str) -> Node:
        ops = self._ops
        gate, up = (
            self._linear(x, module.get_submodule(part), f"{name}.{part}")
            for part in ("gate_proj", "up_proj")
        )
        if activation(self._config) == "silu":
            gate = ops.multiply(gate, ops.unary("sigmoid", gate))
        else:
            gate = self._gelu(gate)
        return self._linear(
            ops.multiply(gate, up), module.get_submodule("down_proj"), f"{name}.down_proj"
        )

    def _gelu(self, x: Node) -> Node:
        """Return x (1 + tanh(sqrt(2/pi) (x + 0.044715 x³))) / 2."""
        ops = self._ops

        def number(value: float) -> Node:
            return ops.constant("gelu", torch.tensor(value))

        cube = ops.multiply(ops.multiply(x, x), ops.multiply(x, number(0.044715)))
        inner = ops.multiply(ops.add(x, cube), number((2 / torch.pi) ** 0.5))
        half = ops.multiply(x, number(0.5))
        return ops.multiply(half, ops.add(ops.unary("tanh", inner), number(1.0)))

    def _norm(self, x: Node, module: nn.Module, name: str) -> Node:
        """Return x / sqrt(mean(x²) + eps) times the weight, or 1 + weight as the family has it."""
        ops = self._ops
        eps = getattr(module, "variance_epsilon", None) or module.eps
        mean = ops.add(ops.mean_square(x), ops.constant("eps", torch.tensor(float(eps))))  # type: ignore[arg-type]
        added = 1.0 if self._family.norms_add_one else 0.0
        weight = module.get_parameter("weight").detach().float() + added
        normed = ops.multiply(x, ops.reciprocal_root(mean))
        return ops.multiply(normed, ops.constant(f"{name}.weight", weight))

    def _linear(self, x: Node, module: nn.Module, name: str) -> Node:
        ops = self._ops
        if isinstance(module, FrozenLinear) and module.weight_format.integers:
            for part in ("scales", "offsets"):
                require_finite(name, module.packed[part])
            y = ops.quantised(name, x, module)
        else:
            weight = module if isinstance(module, FrozenLinear) else module.get_parameter("weight")
            y = ops.dense(name, x, weight)
        bias = dict(module.named_parameters(recurse=False)).get("bias")
        if bias is None:
            return y
        return ops.add(y, ops.constant(f"{name}.bias", bias.detach().float()))
