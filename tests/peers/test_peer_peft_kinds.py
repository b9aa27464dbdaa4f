"""Each kind of adapter there and back: what PEFT trains graft adopts, what graft trains PEFT loads.

Both train the same few steps from the same start, and end with the same adapter.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import graft
from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.formats.registry import make_format
from graft.model.adapter_files import load_adapter, save_adapter
from graft.model.load import load_model
from graft.model.running.loss import target_loss
from graft.model.targets import freeze_layers, select_targets

peft = pytest.importorskip("peft", reason="needs peft: make test-peers installs it")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape"),
]

SAME = 1e-5
"""Two orders of float32 summation, relative to the largest logit."""
WEIGHTS = "adapter_model.safetensors"
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({"r": 4, "lora_alpha": 8}, {"rank": 4, "alpha": 8.0}),
    "rslora": (
        {"r": 5, "lora_alpha": 4, "use_rslora": True},
        {"rank": 5, "alpha": 4.0, "rslora": True},
    ),
    "dora": ({"r": 4, "lora_alpha": 8, "use_dora": True}, {"rank": 4, "alpha": 8.0, "dora": True}),
    "rsdora": (
        {"r": 5, "lora_alpha": 4, "use_rslora": True, "use_dora": True},
        {"rank": 5, "alpha": 4.0, "rslora": True, "dora": True},
    ),
    "bias": ({"r": 4, "lora_alpha": 8, "lora_bias": True}, {"rank": 4, "adapter_bias": True}),
}
"""By name, PEFT's options and ours."""
FAMILIES = ["llama", "gpt2"]


def batch() -> Tensor:
    return torch.randint(0, 90, (3, 17), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=batch()).logits.double()
    return out


def distance(found: Tensor, expected: Tensor) -> float:
    """Return max |found - expected| over max |expected|."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def train(model: nn.Module, parameters: Iterable[nn.Parameter], steps: int = 5) -> None:
    """Descend the mean loss of predicting the batch from itself, shifted."""
    optimizer = torch.optim.SGD(list(parameters), lr=0.3, momentum=0.5)
    for _ in range(steps):
        loss, count = target_loss(model, batch(), batch())
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()


def theirs_on(folder: Path, kind: str, **changes: Any) -> nn.Module:
    """Return PEFT's model with an adapter that has left its start."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = KINDS[kind][0] | {"target_modules": "all-linear", **changes}
    config = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out="gpt2" in str(folder), **options)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def open_model(folder: Path, weight_format: str | None = None) -> PreTrainedModel:
    chosen = make_format(weight_format) if weight_format else None
    model = load_model(str(folder), weight_format=chosen, dtype="float32", device="cpu").model
    freeze_layers(model, select_targets(model, ()))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_train_the_same_adapter(family, kind, bases, tmp_path) -> None:
    theirs = theirs_on(bases[family], kind)
    theirs.save_pretrained(tmp_path / "start")
    ours = open_model(bases[family])
    load_adapter(ours, tmp_path / "start", trainable=True)
    start = logits(ours)
    assert distance(start, logits(theirs)) < SAME
    train(theirs, trainable(theirs))
    train(ours, adapter_parameters(ours, "default").values())
    assert distance(logits(ours), start) > 0.02
    assert distance(logits(ours), logits(theirs)) < SAME
    theirs.save_pretrained(tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    first, found, expected = (
        load_file(tmp_path / name / WEIGHTS) for name in ("start", "ours", "theirs")
    )
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        moved = (tensor - first[name]).norm()
        assert (found[name] - tensor).norm() < 1e-3 * moved + 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_trains_is_adopted_merged_and_exported(family, kind, bases, tmp_path) -> None:
    theirs = theirs_on(bases[family], kind)
    train(theirs, trainable(theirs))
    theirs.save_pretrained(tmp_path / "adapter")
    run = tmp_path / "run"
    graft.adopt(tmp_path / "adapter", run)  # the base is the one that it names
    ours, _ = graft.load(run)
    assert distance(logits(ours), logits(theirs)) < SAME
    assert distance(logits(ours), logits(open_model(bases[family]))) > 0.02
    again, _ = graft.load(run)
    assert torch.equal(logits(again), logits(ours))

    graft.export_model(run, "peft", tmp_path / "back")
    base = AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
    returned = peft.PeftModel.from_pretrained(base, tmp_path / "back").eval()
    assert distance(logits(returned), logits(theirs)) < SAME

    if (family, kind) != ("llama", "bias"):  # neither merges one into layers without a bias
        graft.merge(run, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert distance(logits(merged), logits(theirs.merge_and_unload())) < SAME
    if family == "llama":
        graft.export_model(run, "gguf", tmp_path / "m.gguf")
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
        down = torch.from_numpy(tensors["blk.1.ffn_down.weight"].data.copy())
        layer = ours.get_submodule("model.layers.1.mlp.down_proj")
        assert distance(down.double(), layer.effective_weight()) < SAME


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [None, "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_we_train(family, weights, kind, bases, tmp_path) -> None:
    ours = open_model(bases[family], weights)
    base = AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32).eval()
    with torch.no_grad():
        for name in select_targets(ours, ()):
            weight = ours.get_submodule(name).dense_weight()
            base.get_submodule(name).weight.copy_(weight.T if family == "gpt2" else weight)
    untouched = logits(base)
    config = AdapterConfig(method="lora", **KINDS[kind][1])
    attach_adapter(ours, select_targets(ours, ()), config)
    parameters = adapter_parameters(ours, "default")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith("B"):
                parameter.add_(torch.randn_like(parameter) * 0.02)
    train(ours, parameters.values())
    save_adapter(ours, tmp_path / "adapter", base=str(bases[family]))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert distance(logits(theirs), logits(ours)) < SAME
    assert distance(logits(ours), untouched) > 0.02
    fresh = open_model(bases[family], weights)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(ours))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_pefts(family, kind, bases, tmp_path) -> None:
    """A linear layer by itself, with one random state for both: gradients too."""
    theirs = theirs_on(bases[family], kind, lora_dropout=0.4)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = open_model(bases[family])
    load_adapter(ours, tmp_path / "adapter", trainable=True)
    name = "transformer.h.1.mlp.c_proj" if family == "gpt2" else "model.layers.1.mlp.down_proj"
    layers = ours.get_submodule(name), theirs.get_base_model().get_submodule(name)
    outputs, x = [], torch.randn(5, layers[0].base.in_features)
    for layer in layers:
        layer.train()
        torch.manual_seed(2)
        outputs.append(layer(x))
        outputs[-1].square().sum().backward()
    assert distance(*outputs) < SAME
    adapter, lora = layers[0].adapter("default"), layers[1]
    pairs = [(adapter.A, lora.lora_A["default"].weight), (adapter.B, lora.lora_B["default"].weight)]
    if kind == "dora":
        pairs.append((adapter.magnitude, lora.lora_magnitude_vector["default"].weight))
    for mine, their in pairs:
        assert distance(mine.grad, their.grad) < 1e-4


def test_an_adapter_trained_on_bitsandbytes_nf4(bases, tmp_path) -> None:
    """bitsandbytes rounds every linear layer; the adapter sits on some of them."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    folder = tmp_path / "base"
    # bitsandbytes' own CPU path reads rows that are no multiple of 64 wrong.
    config = AutoConfig.from_pretrained(bases["llama"], intermediate_size=128)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bases["llama"] / file, folder / file)
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantised, dtype=torch.float32
    )
    options = KINDS["dora"][0] | {"target_modules": ["q_proj", "down_proj"]}
    # In training mode, and without dropout: else it packs the weights anew for the CPU, in bf16.
    theirs = peft.get_peft_model(
        base.train(), peft.LoraConfig(task_type="CAUSAL_LM", **options)
    ).train()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    words = {"model": str(folder), "format": "nf4", "double_quant": True}
    graft.adopt(tmp_path / "adapter", tmp_path / "run", **words)
    ours, _ = graft.load(tmp_path / "run")
    assert distance(logits(ours), logits(theirs)) < SAME
    assert distance(logits(ours), logits(open_model(folder, "nf4"))) > 0.02
    graft.merge(tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert distance(logits(merged), logits(theirs)) < SAME
