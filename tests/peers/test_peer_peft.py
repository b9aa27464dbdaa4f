"""PEFT reads the adapters that graft writes and graft those of PEFT: same base, same logits.

PEFT runs on a plain transformers model whose weights are those of graft's base, dequantised where
graft's is quantised.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import graft
from graft.adapters.attach import adapted_layers, adapter_parameters, attach_adapter, frozen_layers
from graft.adapters.config import AdapterConfig
from graft.adapters.qalora import QALoraAdapter
from graft.formats.base import WeightFormat
from graft.formats.registry import make_format
from graft.model.adapter_files import load_adapter, save_adapter
from graft.model.load import load_model
from graft.model.running.loss import target_loss
from graft.model.targets import freeze_layers, select_targets

peft = pytest.importorskip("peft", reason="needs peft: make test-peers installs it")
variants = pytest.importorskip("peft.tuners.lora.variants", reason="needs a peft with QA-LoRA")

pytestmark = [
    # PEFT's remarks on lora_bias: it cannot merge one into a layer without a bias, and on saving
    # takes its one dimension for damage.
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape"),
]

SAME = 1e-5
"""Two orders of float32 summation, relative to the largest logit."""
DEPLOYED = 2e-3
"""The merged offsets are fp16."""
INT = make_format("int")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(request: pytest.FixtureRequest, bases: dict[str, Path]) -> Callable[[str], Path]:
    """The folder of a base: a tiny random one, or a trained one beside the checkout."""

    def folder(family: str) -> Path:
        if family in bases:
            return bases[family]
        return Path(request.getfixturevalue("shared_models")) / family

    return folder


def open_model(folder: Path, weight_format: WeightFormat | None = None) -> PreTrainedModel:
    model = load_model(
        str(folder), weight_format=weight_format, dtype="float32", device="cpu"
    ).model
    freeze_layers(model, select_targets(model, ()))
    return model


def dense_twin(folder: Path, model: nn.Module) -> PreTrainedModel:
    """Return transformers' model with the weights that the frozen layers stand for."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, layer in frozen_layers(model):
            weight = layer.dense_weight()
            twin.get_submodule(name).weight.copy_(weight.T if layer.transposed else weight)
    return twin


def batch(vocabulary: int = 90) -> Tensor:
    return torch.randint(0, vocabulary, (3, 17), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=batch()).logits.double()
    return out


def distance(found: Tensor, expected: Tensor) -> float:
    """Return max |found - expected| over max |expected|."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def trained(
    folder: Path, weight_format: WeightFormat | None, steps: int = 4, **options: Any
) -> PreTrainedModel:
    """Return a model whose adapter took a few steps of AdamW, large enough to move the logits."""
    model = open_model(folder, weight_format)
    config = AdapterConfig(**options)
    attach_adapter(model, select_targets(model, config.targets), config)
    parameters = [
        parameter.requires_grad_() for parameter in adapter_parameters(model, "default").values()
    ]
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    for _ in range(steps):
        loss, count = target_loss(model, batch(), batch())
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


LORA = {
    "plain": {"rank": 4},
    "alpha": {"rank": 3, "alpha": 7.0},
    "rslora": {"rank": 5, "alpha": 2.0, "rslora": True},
    "bias": {"rank": 4, "adapter_bias": True},
}
BASES = {"dense": None, "nf4": make_format("nf4", {"double_quant": True}), "int": INT}


@pytest.mark.parametrize("case", LORA)
@pytest.mark.parametrize("weights", BASES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_reads_our_lora(family, weights, case, base, tmp_path) -> None:
    ours = trained(base(family), BASES[weights], method="lora", **LORA[case])
    save_adapter(ours, tmp_path / "adapter", base=str(base(family)))
    twin = dense_twin(base(family), ours)
    untouched = logits(twin)
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter").eval()
    assert distance(logits(theirs), logits(ours)) < SAME
    assert distance(logits(theirs), untouched) > 0.05


@pytest.mark.parametrize("weights", ["dense", "nf4"])
def test_peft_reads_our_lora_on_a_trained_model(weights, base, tmp_path) -> None:
    folder = base("babyllama-361-1m")
    ours = trained(folder, BASES[weights], method="lora", rank=8)
    save_adapter(ours, tmp_path / "adapter")
    twin = dense_twin(folder, ours)
    untouched = logits(twin)
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter").eval()
    assert distance(logits(theirs), logits(ours)) < SAME
    assert distance(logits(theirs), untouched) > 0.05


def test_peft_reads_some_layers_of_different_rank_and_scaling(base, tmp_path) -> None:
    ours = open_model(base("llama"))
    for patterns, options in (
        (["q_proj", "v_proj"], {"rank": 4}),
        ([r".*layers\.0\.mlp\.(up|down)_proj"], {"rank": 2, "alpha": 9.0}),
    ):
        config = AdapterConfig(method="lora", **options)
        attach_adapter(ours, select_targets(ours, patterns), config)
    with torch.no_grad():
        for parameter in adapter_parameters(ours, "default").values():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(dense_twin(base("llama"), ours), tmp_path / "adapter")
    assert distance(logits(theirs.eval()), logits(ours)) < SAME


def saved_by_peft(folder: Path, out: Path, **options: Any) -> PreTrainedModel:
    """Return PEFT's model with random adapter values, saved in `out`."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(twin, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(out)
    return model


PEFT_CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "alpha": {"r": 3, "lora_alpha": 10},
    "rslora": {"r": 5, "lora_alpha": 10, "use_rslora": True},
    "bias": {"lora_bias": True, "lora_dropout": 0.1},
    "gaussian": {"r": 2, "init_lora_weights": "gaussian"},
}
LLAMA_CASES = PEFT_CASES | {
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"q_proj": 2, r"layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"v_proj": 20, r"model.layers.0.self_attn.q_proj": 11, ".*down_proj": 1},
        "target_modules": "all-linear",
    },
    "patterns-rslora": {
        "rank_pattern": {r"layers\.\d+\.self_attn.[kq]_proj": 3},
        "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 2, "o_proj": 30},
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "o_proj"],
    },
    "some": {"target_modules": r".*layers\.1\..*(gate|up)_proj"},
}
GPT2_CASES = PEFT_CASES | {
    "patterns": {
        "rank_pattern": {"c_attn": 2, "mlp.c_proj": 6},
        "alpha_pattern": {"h.1.attn.c_proj": 3},
        "target_modules": ["c_attn", "c_proj", "c_fc"],
    },
}
READ_CASES = [("llama", case) for case in LLAMA_CASES] + [("gpt2", case) for case in GPT2_CASES]


@pytest.mark.parametrize(("family", "case"), READ_CASES)
def test_we_read_pefts_lora(family, case, base, tmp_path) -> None:
    options = {"target_modules": "all-linear"} | (LLAMA_CASES if family == "llama" else GPT2_CASES)[
        case
    ]
    options["fan_in_fan_out"] = family == "gpt2"
    theirs = saved_by_peft(base(family), tmp_path / "adapter", **options)
    ours = open_model(base(family))
    assert load_adapter(ours, tmp_path / "adapter").name == "lora"
    assert distance(logits(ours), logits(theirs)) < SAME
    assert distance(logits(ours), logits(open_model(base(family)))) > 0.05


def test_there_and_back_again(base, tmp_path) -> None:
    """What PEFT wrote, read and written here, gives PEFT the same model again."""
    theirs = saved_by_peft(base("llama"), tmp_path / "first", **LLAMA_CASES["patterns-rslora"])
    ours = open_model(base("llama"))
    load_adapter(ours, tmp_path / "first")
    save_adapter(ours, tmp_path / "second")
    twin = dense_twin(base("llama"), ours)
    again = peft.PeftModel.from_pretrained(twin, tmp_path / "second").eval()
    assert distance(logits(again), logits(theirs)) < SAME
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("first", "second"))
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "babyllama-361-1m"])
def test_peft_serves_our_qalora_as_plain_lora(family, bits, base, tmp_path) -> None:
    folder = base(family)
    ours = trained(folder, make_format("int", {"bits": bits}), method="qalora", rank=4, alpha=6.0)
    save_adapter(ours, tmp_path / "adapter", as_lora=True)
    twin = dense_twin(folder, ours)
    untouched = logits(twin)
    # The unrounded form: base + delta, dense.
    dense = dense_twin(folder, ours)
    with torch.no_grad():
        for name, layer in adapted_layers(ours):
            moved = layer.base.dense_weight().double() + layer.adapter("default").delta(layer.base)
            weight = dense.get_submodule(name).weight
            weight.copy_(moved.T if layer.base.transposed else moved)
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter").eval()
    assert distance(logits(theirs), logits(dense)) < SAME
    assert distance(logits(theirs), logits(ours)) < DEPLOYED
    assert distance(logits(theirs), untouched) > 0.05


class Stand(nn.Module):
    """What PEFT's QA-LoRA formula reads of a layer; in PEFT itself only GPTQ layers have it."""

    def __init__(self, A: Tensor, B: Tensor, config: Any, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(*A.T.shape, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(*B.T.shape, bias=False)})
        self.lora_A["default"].weight.data.copy_(A)
        self.lora_B["default"].weight.data.copy_(B)
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
        rank = config.r**0.5 if config.use_rslora else config.r
        self.scaling = {"default": config.lora_alpha / rank}
        self.qalora_group_size = {"default": config.qalora_group_size}

    def forward(self, x: Tensor) -> Tensor:
        zero = torch.zeros(1)
        return variants.QALoraLinearVariant.forward(self, "default", x, zero)


def layer_input(in_features: int) -> Tensor:
    return torch.randn(2, 5, in_features, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("group_size", [8, 16, 32])
def test_we_read_pefts_qalora(group_size, rslora, base, tmp_path) -> None:
    """64 and 96 inputs make different numbers of groups, so one factor for all would not do."""
    folder = base("llama")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=5,
        use_rslora=rslora,
        target_modules=["q_proj", "down_proj"],
        use_qalora=True,
        qalora_group_size=group_size,
    )
    config.inference_mode = True
    config.save_pretrained(tmp_path)
    ours = open_model(folder, make_format("int", {"group_size": group_size}))
    layers = dict(frozen_layers(ours))
    stands, tensors = {}, {}
    for name in select_targets(ours, ["q_proj", "down_proj"]):
        layer = layers[name]
        A = torch.randn(3, layer.in_features // group_size)
        B = torch.randn(layer.out_features, 3)
        stands[name] = Stand(A, B, config, layer.in_features)
        tensors |= {
            f"base_model.model.{name}.lora_A.weight": A,
            f"base_model.model.{name}.lora_B.weight": B,
        }
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert load_adapter(ours, tmp_path).name == "qalora"
    adapted = dict(adapted_layers(ours))
    assert set(adapted) == set(stands)
    for name, stand in stands.items():
        layer = adapted[name]
        x = layer_input(layer.base.in_features)
        delta = layer.adapter("default").delta(layer.base)
        expected = stand(x).double()
        assert distance(x.double() @ delta.T, expected) < SAME
        moved = layer(x) - layer.base(x)
        # The offsets are of the size of the update, and fp16 holds 11 bits of them.
        assert distance(moved.double(), expected) < DEPLOYED
    integers = {"format": "int", "group_size": group_size, "out": str(tmp_path / "int4")}
    graft.quantize(graft.QuantizeConfig(model=str(folder), **integers))
    graft.adopt(tmp_path, tmp_path / "run", model=integers["out"])
    adopted, _ = graft.load(tmp_path / "run")
    assert torch.equal(logits(adopted), logits(ours))
    assert graft.merge(tmp_path / "run", tmp_path / "merged").exact


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("group_size", [16, 32])
def test_pefts_formula_reads_our_qalora(group_size, rslora, base, tmp_path) -> None:
    ours = trained(
        base("llama"),
        make_format("int", {"group_size": group_size}),
        method="qalora",
        rank=4,
        alpha=6.0,
        rslora=rslora,
    )
    save_adapter(ours, tmp_path / "adapter")
    config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    assert config.use_qalora and config.qalora_group_size == group_size
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    default, rank = config.lora_alpha, config.r
    for name, layer in adapted_layers(ours):
        adapter = layer.adapter("default")
        assert isinstance(adapter, QALoraAdapter)
        config.lora_alpha = config.alpha_pattern.get(name, default)
        config.r = config.rank_pattern.get(name, rank)
        parts = [tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB"]
        stand = Stand(*parts, config, layer.base.in_features)
        x = layer_input(layer.base.in_features)
        assert distance(stand(x).double(), x.double() @ adapter.delta(layer.base).T) < SAME


def test_our_files_are_those_that_peft_writes(base, tmp_path) -> None:
    """Same tensor names and dtypes, and a configuration that PEFT itself takes as its own."""
    saved_by_peft(base("llama"), tmp_path / "theirs", target_modules="all-linear", r=4)
    save_adapter(trained(base("llama"), None, method="lora", rank=4), tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert {k: (t.shape, t.dtype) for k, t in theirs.items()} == {
        k: (t.shape, t.dtype) for k, t in ours.items()
    }
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    known = peft.LoraConfig.from_pretrained(tmp_path / "ours").to_dict()
    assert set(written) <= set(known)
