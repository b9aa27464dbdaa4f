"""Native decoding against transformers' own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.formats.base import WeightFormat
from graft.formats.registry import make_format
from graft.kernels.backend.native_library import why_unavailable
from graft.model.load import LoadedModel, load_model
from graft.model.running import decode as decode_module
from graft.model.running.decode import Decoder, why_not_native
from graft.model.targets import freeze_layers, select_targets

needs_library = pytest.mark.skipif(
    why_unavailable() is not None, reason=f"native backend: {why_unavailable()}"
)

FORMATS: dict[str, WeightFormat | None] = {
    "dense": None,
    "int4": make_format("int", {"bits": 4, "group_size": 32}),
    "nf4": make_format("nf4", {"double_quant": True}),
    "int8": make_format("int8", {}),
}
PROMPT = 5


def transformers_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the logits after the prompt, and then after every single token."""
    cache, rows = DynamicCache(), []
    with torch.no_grad():
        for piece in (tokens[:PROMPT], *tokens[PROMPT:].split(1)):
            out = model(input_ids=piece[None], past_key_values=cache, use_cache=True)
            rows.append(out.logits[0, -1].float())
    return torch.stack(rows)


def native_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    assert why_not_native(model, len(tokens)) is None
    decoder = Decoder(model, len(tokens))
    decoder.start({0: tokens[:PROMPT]})
    return torch.cat([decoder.step({0: int(token)}) for token in tokens[PROMPT - 1 :]])


def assert_equal_in_float32(model: PreTrainedModel, tokens: Tensor) -> None:
    expected = transformers_logits(model, tokens)
    difference = (native_logits(model, tokens) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()


@pytest.fixture
def text() -> Tensor:
    return torch.randint(0, 320, (30,), generator=torch.Generator().manual_seed(1))


@needs_library
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "mistral"])
def test_logits_equal_transformers(
    load: Callable[..., LoadedModel], family: str, weight_format: str, text: Tensor
) -> None:
    loaded = load(family, weight_format=FORMATS[weight_format])
    loaded.model.config.sliding_window = None
    assert_equal_in_float32(loaded.model, text)


@needs_library
def test_the_decoder_changes_nothing(load: Callable[..., LoadedModel], text: Tensor) -> None:
    model = load("llama", weight_format=FORMATS["int4"]).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = transformers_logits(model, text)
    once, again = native_logits(model, text), native_logits(model, text)
    assert torch.equal(once, again)
    assert torch.equal(transformers_logits(model, text), first)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@needs_library
def test_bf16_is_as_near_to_float32_as_transformers_is(
    load: Callable[..., LoadedModel], text: Tensor
) -> None:
    for family in ("llama", "qwen2"):
        exact = transformers_logits(load(family).model, text)
        model = load(family, dtype="bfloat16").model
        errors = [
            (logits - exact).pow(2).mean().sqrt()
            for logits in (native_logits(model, text), transformers_logits(model, text))
        ]
        assert errors[0] <= 1.5 * errors[1]


def adapted(loaded: LoadedModel, method: Any) -> PreTrainedModel:
    model = loaded.model
    config = AdapterConfig(method=method, rank=4)
    attach_adapter(model, select_targets(model, ()), config)
    with torch.no_grad():
        for parameter in adapter_parameters(model, "default").values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@needs_library
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_head_that_is_stored_in_bf16_is_read_in_bf16(
    checkpoint: Callable[..., Path], family: str, text: Tensor
) -> None:
    folder = checkpoint(family, torch.bfloat16)
    model = load_model(str(folder), dtype="float32", device="cpu").model
    described = decode_module._describe(model, 9)
    for weight in (described.head.weight, described.embedding):
        assert weight.tensors[0] is not None and weight.tensors[0].dtype == torch.bfloat16
    assert described.dtype == torch.float32
    assert_equal_in_float32(model, text)


@needs_library
@pytest.mark.parametrize("method", ["qalora", "affine"])
def test_adapters_that_move_the_grid_are_decoded(
    load: Callable[..., LoadedModel], method: str, text: Tensor
) -> None:
    loaded = load("llama", weight_format=FORMATS["int4"])
    before = transformers_logits(loaded.model, text)
    model = adapted(loaded, method)
    assert (transformers_logits(model, text) - before).abs().max() > 0.1
    assert_equal_in_float32(model, text)


@needs_library
def test_reasons_against(load: Callable[..., LoadedModel]) -> None:
    def reason(family: str = "llama", positions: int = 30, **changes: Any) -> str:
        model = load(family).model
        for name, value in changes.items():
            setattr(model.config, name, value)
        return why_not_native(model, positions) or ""

    assert reason() == ""
    assert "Gemma" in reason("gemma") and "GPT2" in reason("gpt2")
    assert "window of 4" in reason("mistral", 5) and reason("mistral", 4) == ""
    assert "hidden_act" in reason(hidden_act="gelu")
    assert "rope" in reason(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4})
    assert "training" in (why_not_native(load("llama").model.train(), 9) or "")
    assert "bfloat16" in (why_not_native(_with_a_bf16_norm(load("llama").model), 9) or "")
    assert "meta" in (why_not_native(load("llama").model.to("meta"), 9) or "")
    assert "float16" in (why_not_native(load("llama").model.half(), 9) or "")
    lora = load("llama", weight_format=FORMATS["nf4"])
    assert "adapter" in (why_not_native(adapted(lora, "lora"), 9) or "")
    half = load("llama").model
    half.model.layers[1].mlp.up_proj.half()
    freeze_layers(half, ["model.layers.1.mlp.up_proj"])
    assert "layers.1.mlp.up_proj is stored in torch.float16" in (why_not_native(half, 9) or "")


def _with_a_bf16_norm(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[1].input_layernorm.bfloat16()
    return model


class _OwnLlama(LlamaForCausalLM):
    pass


def test_a_class_of_the_users_own_goes_through_its_own_forward() -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    assert "_OwnLlama" in (why_not_native(_OwnLlama(config).eval(), 9) or "")


@needs_library
@pytest.mark.parametrize("weight_format", ["dense", "int4"])
@pytest.mark.parametrize("name", ["stories260k", "babyllama-361-1m", "mixed-13m"])
def test_real_models(shared_models: Path, name: str, weight_format: str) -> None:
    folder = shared_models / name
    model = load_model(
        str(folder), dtype="float32", device="cpu", weight_format=FORMATS[weight_format]
    ).model
    tokens = torch.arange(3, 3 + PROMPT)
    decoder = Decoder(model, 64)
    decoder.start({0: tokens})
    logits = decoder.step({0: int(tokens[-1])})[0]
    while len(tokens) < 60:
        tokens = torch.cat((tokens, logits.argmax()[None]))
        logits = decoder.step({0: int(tokens[-1])})[0]
    expected = transformers_logits(model, tokens)
    assert torch.equal(expected.argmax(-1)[:-1], tokens[PROMPT:])
    assert (logits - expected[-1]).abs().max() <= 1e-5 * expected.abs().max()
