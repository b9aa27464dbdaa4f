"""The loss, computed by one function for training and for evaluation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

IGNORED = -100


def target_loss(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Return (sum of -log p over the targets in nats, number of targets).

    input_ids, labels: int64 [batch, length]; labels[b, t] is the token that position t - 1 must
    predict, or -100 where nothing is asked. Rows are padded on the right, which a causal model does
    not see, so there is no attention mask. Softmax is in float32, over the targets' rows only.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    asked = targets != IGNORED
    loss = functional.cross_entropy(logits[asked].float(), targets[asked], reduction="sum")
    return loss, int(asked.sum())
