"""graft's attention in transformers' models: PyTorch's own results, and nobody else's models."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch
from small_models import PLAIN, SMALL, model_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

import graft
from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.kernels.backend import native_library
from graft.model.running.attention import NAME, use_own_attention
from graft.model.targets import freeze_layers, select_targets

pytestmark = pytest.mark.skipif(
    native_library.why_unavailable() is not None,
    reason=f"native backend: {native_library.why_unavailable()}",
)


class Seen(TorchDispatchMode):
    """Counts graft's and PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.own = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.own += name.startswith("graft::attention.") or name == "graft::attention"
        self.others += "scaled_dot_product" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


def ids(length: int = 23) -> Tensor:
    return torch.randint(96, (2, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", PLAIN)
def test_logits_are_those_of_pytorch_s_attention(family: str) -> None:
    model = model_of(family)
    with torch.no_grad():
        expected = model(ids(), use_cache=False).logits
        assert model.config._attn_implementation == "sdpa"
        assert use_own_attention(model)
        with Seen() as seen:
            logits = model(ids(), use_cache=False).logits
    assert seen.own == 2 and seen.others == 0
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


@pytest.mark.parametrize("family", PLAIN)
def test_families_leave_attention_to_the_interface(family: str) -> None:
    """None asks for PyTorch's by name, so that another name changes nothing else."""
    source = inspect.getsource(sys.modules[type(model_of(family)).__module__])
    assert '"sdpa"' not in source and "'sdpa'" not in source
    assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in source


def test_gradients_of_adapters_equal_pytorch_s() -> None:
    def gradients(own: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        model = model_of("llama").to(dtype).requires_grad_(False)
        if own:
            assert use_own_attention(model)
        names = select_targets(model, ())
        freeze_layers(model, names)
        attach_adapter(model, names, AdapterConfig(method="lora", rank=4))
        parameters = adapter_parameters(model, "default")
        torch.manual_seed(7)
        for parameter in parameters.values():
            torch.nn.init.normal_(parameter, std=0.05)
        model.train()
        with Seen() as seen:
            out = model(ids(), labels=ids(), use_cache=False)
        assert (seen.own, seen.others) == ((2, 0) if own else (0, 2))
        out.loss.backward()
        return {name: parameter.grad for name, parameter in parameters.items()}

    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        expected, got = gradients(False, dtype), gradients(True, dtype)
        assert expected.keys() == got.keys() and got
        for name, gradient in got.items():
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error <= tolerance, name


def test_what_the_kernels_do_not_compute_goes_to_pytorch() -> None:
    model = model_of("mistral", sliding_window=8)
    plain = model_of("llama")
    left = torch.ones_like(ids())
    left[0, :4] = 0
    with torch.no_grad():
        expected = [
            model(ids(), use_cache=False).logits,
            plain(ids(), attention_mask=left, use_cache=False).logits,
            plain.double()(ids(), use_cache=False).logits,
        ]
        plain.float()
        assert use_own_attention(model) and use_own_attention(plain)
        with Seen() as seen:
            got = [
                model(ids(), use_cache=False).logits,
                plain(ids(), attention_mask=left, use_cache=False).logits,
                plain.double()(ids(), use_cache=False).logits,
            ]
    assert seen.own == 0 and seen.others == 6
    for logits, wanted in zip(got, expected, strict=True):
        assert torch.equal(logits, wanted)


def test_a_mask_of_ones_is_no_mask() -> None:
    model = model_of("llama")
    assert use_own_attention(model)
    with torch.no_grad(), Seen() as seen:
        model(ids(), attention_mask=torch.ones_like(ids()), use_cache=False)
    assert seen.own == 2 and seen.others == 0


def test_attention_that_drops_out_is_pytorch_s() -> None:
    model = model_of("llama", attention_dropout=0.5).train()
    assert use_own_attention(model)
    torch.manual_seed(1)
    got = model(ids(), use_cache=False).logits
    model.set_attn_implementation("sdpa")
    torch.manual_seed(1)
    assert torch.equal(got, model(ids(), use_cache=False).logits)


def test_generated_tokens_are_those_of_pytorch_s_attention() -> None:
    model = model_of("llama")
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids())}
    expected = model.generate(ids(), **options)
    assert use_own_attention(model)
    assert torch.equal(model.generate(ids(), **options), expected)


def test_models_that_must_stay_as_they_are() -> None:
    eager = model_of("llama", attn_implementation="eager")
    assert not use_own_attention(eager) and eager.config._attn_implementation == "eager"
    unknown = model_of("opt", ffn_dim=96, word_embed_proj_dim=64)
    assert not use_own_attention(unknown) and unknown.config._attn_implementation == "sdpa"

    class OwnCode(LlamaForCausalLM):
        pass

    remote = OwnCode(LlamaConfig(**SMALL))
    assert not use_own_attention(remote) and remote.config._attn_implementation == "sdpa"


def test_without_a_native_backend_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.model.running.attention.why_unavailable", lambda: "no compiler")
    model = model_of("llama")
    with torch.no_grad():
        expected = model(ids(), use_cache=False).logits
        assert use_own_attention(model)
        with Seen() as seen:
            assert torch.equal(model(ids(), use_cache=False).logits, expected)
    assert seen.own == 0 and seen.others == 2


def test_the_configuration_file_does_not_name_it(tmp_path: Path) -> None:
    model = model_of("llama")
    assert use_own_attention(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_training_uses_it(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    config = graft.TrainConfig(
        model=str(tiny_base),
        data=str(rows),
        out=str(tmp_path / "run"),
        method="lora",
        steps=1,
        device="cpu",
    )
    with Seen() as seen:
        graft.finetune(config)
    assert seen.own > 0 and seen.others == 0
