"""The formula against the tensors that autograd saves."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import _VersionWrapper

from graft.adapters.attach import attach_adapter
from graft.adapters.config import AdapterConfig
from graft.adapters.registry import method_of
from graft.formats.registry import make_format
from graft.model.load import load_model
from graft.model.running import checkpointing as checkpointing_module
from graft.model.running.checkpointing import CHECKPOINTING, enable_checkpointing
from graft.model.running.pointwise import use_own_pointwise
from graft.model.targets import freeze_layers, select_targets
from graft.model.trained import what_trains
from graft.plan.activations import Activations, plan_activations
from graft.plan.skeleton import plan_model

BATCH, LENGTH, LAYERS = 3, 40, 3
ATTENTION = {"llama": ("q_proj", "v_proj"), "qwen2": ("q_proj", "v_proj"), "gpt2": ("c_attn",)}
METHODS = {
    "lora": (AdapterConfig(method="lora", rank=4), None),
    "lora-dropout": (AdapterConfig(method="lora", rank=4, dropout=0.1), None),
    "dora": (AdapterConfig(method="lora", rank=4, dora=True), None),
    "dora-dropout": (AdapterConfig(method="lora", rank=4, dora=True, dropout=0.1), None),
    "lora-int8": (AdapterConfig(method="lora", rank=4), ("int8", {})),
    "qlora": (AdapterConfig(method="qlora", rank=4), ("nf4", {"double_quant": True})),
    "qdora": (AdapterConfig(method="qlora", rank=4, dora=True), ("nf4", {})),
    "qalora": (AdapterConfig(method="qalora", rank=4), ("int", {})),
    "qalora-scales": (AdapterConfig(method="qalora", rank=4, grid_rank=2), ("int", {})),
    "affine": (AdapterConfig(method="affine"), ("int", {"bits": 2})),
    "merge_aware": (AdapterConfig(method="merge_aware"), ("latent", {"bits": 2})),
    "full": (AdapterConfig(method="full"), None),
}


def saved_bytes(folder, weight_format, adapter, dtype, checkpointing="none") -> int:
    """Return the bytes that autograd keeps after a forward pass, each storage once.

    With checkpointing, that are the layers' inputs; `kept_products` has what they keep besides.
    """
    model = load_model(str(folder), weight_format=weight_format, dtype=dtype).model
    names = select_targets(model, adapter.targets)
    if adapter.method == "full":
        method_of(adapter).make_trainable(model, what_trains(model, adapter), adapter)
    else:
        freeze_layers(model, names)
        attach_adapter(model, names, adapter)
    use_own_pointwise(model)
    enable_checkpointing(model, checkpointing)
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


def planned_activations(folder, weight_format, adapter, dtype, checkpointing="none") -> Activations:
    planned = plan_model(
        str(folder), weight_format=weight_format, adapter=adapter, dtype=dtype, device="cpu"
    )
    return plan_activations(
        planned.model,
        adapter,
        planned.dtype,
        planned.device,
        tokens=BATCH * LENGTH,
        sequence_length=LENGTH,
        checkpointing=checkpointing,
    )


def planned_bytes(*case) -> int:
    return planned_activations(*case).kept_bytes


@pytest.fixture
def kept_products(monkeypatch):
    """A function that returns the bytes of the outputs that checkpointing has kept so far."""
    storages: list[dict] = []
    create = checkpointing_module.create_selective_checkpoint_contexts

    def recorded(policy):
        forward, backward = create(policy)
        storages.append(forward.storage)
        return forward, backward

    monkeypatch.setattr(checkpointing_module, "create_selective_checkpoint_contexts", recorded)

    def total() -> int:
        wrapped = [
            leaf for storage in storages for calls in storage.values() for leaf in calls.values()
        ]
        kept = [leaf.val for leaf in tree_leaves(wrapped) if isinstance(leaf, _VersionWrapper)]
        unique = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in kept}
        return sum(storage.nbytes() for storage in unique.values())

    return total


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


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("words", ["layers.1-,lm_head", "lm_head", "norms", "layers.0-0.attention"])
def test_layers_below_the_lowest_trained_one_keep_nothing(
    model_folder, kept_products, words, checkpointing
):
    adapter = AdapterConfig(method="full", train=(words,))
    case = (model_folder("llama"), None, adapter, "float32", checkpointing)
    kept = saved_bytes(*case) + kept_products()
    assert planned_bytes(*case) == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("checkpointing", ["products", "half", "layers"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_checkpointing(model_folder, kept_products, family, method, checkpointing):
    adapter, options = METHODS[method]
    weight_format = make_format(*options) if options else None
    case = (model_folder(family), weight_format, adapter, "float32")
    inputs = saved_bytes(*case, checkpointing)
    planned = planned_activations(*case, checkpointing)
    assert planned.kept_bytes == pytest.approx(inputs + kept_products(), rel=0.03)
    hidden = BATCH * LENGTH * 48 * 4
    one_layer = (saved_bytes(*case) - inputs + LAYERS * hidden) / LAYERS
    assert planned.recomputed_bytes == pytest.approx(one_layer, rel=0.1)


def test_each_choice_keeps_less(model_folder):
    adapter, options = METHODS["qlora"]
    case = (model_folder("llama"), make_format(*options), adapter, "bfloat16")
    none, products, half, layers = (planned_activations(*case, choice) for choice in CHECKPOINTING)
    # Norms and gates keep nothing of their own, so that products are most of what there is to keep.
    assert none.kept_bytes > 1.25 * products.kept_bytes > 1.6 * layers.kept_bytes
    assert products.kept_bytes > half.kept_bytes > layers.kept_bytes
    assert none.recomputed_bytes == 0 < products.recomputed_bytes == layers.recomputed_bytes
