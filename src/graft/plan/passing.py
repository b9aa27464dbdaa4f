"""What a run takes for a while: the loss, the layer at work, merging and rounding."""

from __future__ import annotations

from graft.adapters.attach import frozen_layers
from graft.adapters.config import AdapterConfig
from graft.adapters.registry import method_of
from graft.kernels.backend import native_library
from graft.model.running.loss import BLOCK_LOGITS, chunk_tokens
from graft.plan.skeleton import PlannedModel, WeightCounts

MERGE_BYTES = 36
"""Per weight of the layer that is being merged: four float64 matrices (trained, base, difference
and its square) and the merged one in float32."""


def loss_bytes(planned: PlannedModel, tokens: int) -> int:
    """Return what the loss needs: logits and their gradient for a chunk of tokens, the softmax of
    a block of them in float32, the hidden states' gradient twice, and the head's, if it trains.
    The gradient takes the logits' place; on a CPU the head's product takes a copy of it.
    """
    vocabulary, hidden = planned.model.get_input_embeddings().get_parameter("weight").shape
    chunk = min(tokens, chunk_tokens(vocabulary, planned.device)) * vocabulary
    block = min(chunk, max(BLOCK_LOGITS, vocabulary)) if planned.device.type == "cpu" else chunk
    head = planned.model.get_output_embeddings()
    trained = sum(p.numel() for p in head.parameters() if p.requires_grad) if head else 0
    itemsize = planned.dtype.itemsize
    return 2 * itemsize * (chunk + tokens * hidden) + 2 * 4 * block + 4 * trained


def divergence_bytes(planned: PlannedModel, teacher: PlannedModel, tokens: int) -> int:
    """Return what a divergence adds to the loss: of a chunk of tokens five more matrices of logits
    in float32, and the hidden states of both models, whose gradient is found later.
    """
    vocabulary, hidden = planned.model.get_input_embeddings().get_parameter("weight").shape
    chunk = min(tokens, chunk_tokens(vocabulary, planned.device)) * vocabulary
    wide = teacher.model.get_input_embeddings().get_parameter("weight").shape[1]
    return 5 * 4 * chunk + tokens * (hidden + wide) * planned.dtype.itemsize


def buffer_bytes(planned: PlannedModel, tokens: int, widest: int) -> int:
    """Return four of the widest features of the layer at work: an MLP's, or their gradients."""
    return 4 * tokens * widest * planned.dtype.itemsize


def workspace_bytes(planned: PlannedModel, counts: WeightCounts, tokens: int, widest: int) -> int:
    """Return what the layer at work needs: its buffers and, but for the native backend, a quantised
    weight in float32 and the compute dtype; a latent weight two float32 gradients of its size, and
    itself in float32 where it is kept in 8 bits.
    """
    in_pieces = planned.device.type == "cpu" and native_library.why_unavailable() is None
    bytes_each = 0 if in_pieces else 4 + planned.dtype.itemsize
    formats = [layer.weight_format for _, layer in frozen_layers(planned.model)]
    bytes_each += max((one.workspace_bytes for one in formats), default=0)
    return bytes_each * counts.largest_quantised + buffer_bytes(planned, tokens, widest)


def merging_bytes(planned: PlannedModel, counts: WeightCounts, adapter: AdapterConfig) -> int:
    """Return what merging and saving adds to the weights.

    An update that no grid absorbs turns into dense weights in the source's dtype, which take the
    frozen ones' place layer by layer; methods that merge exactly keep their size.
    """
    method = method_of(adapter)
    if not method.trains_adapter:
        return 0
    grown = 0
    if not method.merges_exactly:
        dense = counts.frozen_weights * planned.source_dtype.itemsize
        grown = max(0, dense - counts.frozen_bytes)
    return grown + MERGE_BYTES * counts.largest_layer


def rounding_bytes(planned: PlannedModel, counts: WeightCounts, itemsize: int, tokens: int) -> int:
    """Return what calibrated rounding holds: the dense weights, of so many bytes each, the float64
    copies of the layer at work, float64 Hessians (those of one decoder layer's linear layers, as
    many of the drift, and four more of the widest, which GPTQ factors), and a layer's inputs and
    outputs for all tokens, rounded and not.
    """
    text = planned.model.config.get_text_config()
    widths = [layer.in_features for _, layer in frozen_layers(planned.model)]
    squares = sum(width * width for width in widths) // text.num_hidden_layers
    squares = 2 * squares + 4 * max(widths) ** 2
    hidden = 4 * tokens * text.hidden_size * planned.dtype.itemsize
    weights = itemsize * counts.frozen_weights
    return weights + MERGE_BYTES * counts.largest_layer + 8 * squares + hidden
