"""The formula against the tensors that autograd saves."""

from __future__ import annotations

import pytest
import torch

from graft.adapters.attach import attach_adapter
from graft.adapters.config import AdapterConfig
from graft.formats.registry import make_format
from graft.model.load import load_model
from graft.model.targets import freeze_layers, select_targets
from graft.plan.activations import plan_activations
from graft.plan.skeleton import plan_model

BATCH, LENGTH, LAYERS = 3, 40, 3
ATTENTION = {"llama": ("q_proj", "v_proj"), "qwen2": ("q_proj", "v_proj"), "gpt2": ("c_attn",)}
METHODS = {
    "lora": (AdapterConfig(method="lora", rank=4), None),
    "lora-dropout": (AdapterConfig(method="lora", rank=4, dropout=0.1), None),
    "lora-int8": (AdapterConfig(method="lora", rank=4), ("int8", {})),
    "qlora": (AdapterConfig(method="qlora", rank=4), ("nf4", {"double_quant": True})),
    "qalora": (AdapterConfig(method="qalora", rank=4), ("int", {})),
    "affine": (AdapterConfig(method="affine"), ("int", {"bits": 2})),
    "full": (AdapterConfig(method="full"), None),
}


def saved_bytes(folder, weight_format, adapter, dtype, checkpointing=False) -> int:
    """Return the bytes that autograd keeps after a forward pass, each storage once."""
    model = load_model(str(folder), weight_format=weight_format, dtype=dtype).model
    names = select_targets(model, adapter.targets)
    if adapter.method == "full":
        model.requires_grad_(True)
    else:
        freeze_layers(model, names)
        attach_adapter(model, names, adapter)
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being reused
        return tensor

    ids = torch.randint(90, (BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def planned_bytes(folder, weight_format, adapter, dtype, checkpointing=False) -> int:
    planned = plan_model(
        str(folder), weight_format=weight_format, adapter=adapter, dtype=dtype, device="cpu"
    )
    return plan_activations(
        planned.model,
        adapter,
        planned.dtype,
        planned.device,
        batch_size=BATCH,
        sequence_length=LENGTH,
        gradient_checkpointing=checkpointing,
    ).kept_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_activations_within_ten_percent(model_folder, family, method, dtype):
    adapter, options = METHODS[method]
    weight_format = make_format(*options) if options else None
    case = (model_folder(family), weight_format, adapter, dtype)
    assert planned_bytes(*case) == pytest.approx(saved_bytes(*case), rel=0.1)


@pytest.mark.parametrize("family", ATTENTION)
def test_what_does_not_train_keeps_no_input(model_folder, family):
    adapter = AdapterConfig(method="lora", rank=4, targets=ATTENTION[family])
    case = (model_folder(family), None, adapter, "float32")
    assert planned_bytes(*case) == pytest.approx(saved_bytes(*case), rel=0.1)


@pytest.mark.parametrize("method", ["lora", "qlora", "affine", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_keeps_the_inputs_and_one_layer(model_folder, family, method):
    adapter, options = METHODS[method]
    weight_format = make_format(*options) if options else None
    case = (model_folder(family), weight_format, adapter, "float32")
    outside = saved_bytes(*case, checkpointing=True)
    hidden = BATCH * LENGTH * 48 * 4
    one_layer = (saved_bytes(*case) - outside + LAYERS * hidden) / LAYERS
    assert planned_bytes(*case, checkpointing=True) == pytest.approx(outside + one_layer, rel=0.1)
