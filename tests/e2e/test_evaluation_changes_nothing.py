"""Evaluating between two training steps changes nothing; two runs give the same adapter.

Some 4-bit layers are repacked for evaluation, and the gradients of the next training step are then
wrong with the loss unchanged. Here packed tensors and gradients stay as they are, bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import graft
from graft.adapters.attach import adapter_parameters, attach_adapter, frozen_layers
from graft.adapters.config import AdapterConfig
from graft.data.encode import Example
from graft.evaluate.generate import generate_text
from graft.evaluate.loss import evaluate_loss
from graft.formats.registry import make_format
from graft.model.load import LoadedModel, load_model
from graft.model.running.loss import target_loss
from graft.model.targets import freeze_layers, select_targets

CASES = {
    "lora-dense": ("lora", None),
    "dora-dense": ("dora", None),
    "qlora-nf4": ("qlora", ("nf4", {"double_quant": True})),
    "qlora-nf4-plain": ("qlora", ("nf4", {})),
    "qlora-fp4": ("qlora", ("fp4", {"double_quant": True})),
    "qlora-int8": ("qlora", ("int8", {})),
    "qlora-int4": ("qlora", ("int", {})),
    "qalora-int4": ("qalora", ("int", {"bits": 4})),
    "qalora-int3": ("qalora", ("int", {"bits": 3, "group_size": 16})),
    "qalora-int8": ("qalora", ("int", {"bits": 8})),
    "affine-int4": ("affine", ("int", {})),
    "merge_aware-int3": ("merge_aware", ("latent", {"bits": 3})),
    "affine-int2": ("affine", ("int", {"bits": 2})),
}


def adapted(base: Path, case: str, dtype: str) -> LoadedModel:
    """Return a model with an adapter that has moved away from its start."""
    method, description = CASES[case]
    weight_format = None if description is None else make_format(*description)
    loaded = load_model(str(base), weight_format=weight_format, dtype=dtype, device="cpu")
    names = select_targets(loaded.model, ())
    if weight_format is None:
        freeze_layers(loaded.model, names)
    torch.manual_seed(3)
    dora = method == "dora"
    config = AdapterConfig(method="lora" if dora else method, rank=4, dora=dora)
    attach_adapter(loaded.model, names, config)
    loaded.model.train()
    for parameter in adapter_parameters(loaded.model, "default").values():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 1e-2)
    return loaded


def gradients(loaded: LoadedModel) -> dict[str, Tensor]:
    """Return the loss and the adapter's gradients on a fixed batch."""
    ids = torch.arange(48).reshape(2, 24) + 9
    loss, _ = target_loss(loaded.model, ids, ids)
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in adapter_parameters(loaded.model, "default").items():
        assert parameter.grad is not None and parameter.grad.any(), name
        found[name], parameter.grad = parameter.grad, None
    return found


def evaluate(loaded: LoadedModel) -> None:
    """Run the model in every way that evaluates: one token, many, a loss, a continuation."""
    loaded.model.eval()
    with torch.no_grad():
        for tokens in (1, 7, 40):
            loaded.model(torch.arange(tokens)[None] + 11)
    row = list(range(20, 50))
    evaluate_loss(loaded.model, [Example(row, [False] + [True] * 29, "test")], 1)
    generate_text(loaded.model, loaded.tokenizer, row, max_new_tokens=4)
    loaded.model.train()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_evaluating_between_two_steps_changes_nothing(case, dtype, tiny_base) -> None:
    loaded = adapted(tiny_base, case, dtype)
    before = gradients(loaded)
    layers = dict(frozen_layers(loaded.model))
    packed = {
        (layer, name): (tensor, tensor.clone(), tensor.data_ptr())
        for layer, module in layers.items()
        for name, tensor in module.packed.items()
    }
    evaluate(loaded)
    assert dict(frozen_layers(loaded.model)) == layers, "a layer was replaced"
    for (layer, name), (tensor, content, place) in packed.items():
        now = layers[layer].packed[name]
        assert now is tensor and now.data_ptr() == place, (layer, name)
        assert now.dtype == content.dtype and torch.equal(now, content), (layer, name)
    after = gradients(loaded)
    assert after.keys() == before.keys()
    for name, gradient in before.items():
        assert torch.equal(after[name], gradient), name


@pytest.fixture(scope="module")
def wide_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose layers are wide enough to be shared out to threads."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=672, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / file, folder / file)
    return folder


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["qlora", "qalora"])
def test_two_runs_give_the_same_adapter(method, dtype, wide_base, rows, tmp_path) -> None:
    adapters, kept = [], []
    for number in range(2):
        run = tmp_path / f"run{number}"
        graft.finetune(
            graft.TrainConfig(
                model=str(wide_base),
                data=str(rows),
                out=str(run),
                method=method,
                dtype=dtype,
                steps=2,
                batch_size=2,
                max_length=24,
                learning_rate=1e-2,
            )
        )
        adapters.append(run / "adapter" / "adapter_model.safetensors")
        kept.append(torch.empty(12345))  # so that the tensors of the next run lie elsewhere
    first, second = (file.read_bytes() for file in adapters)
    assert first == second
    ends = ("lora_B.weight", ".B", ".u_B")
    trained = [tensor for name, tensor in load_file(adapters[0]).items() if name.endswith(ends)]
    assert trained and all(tensor.any() for tensor in trained), "B begins with zeros"
