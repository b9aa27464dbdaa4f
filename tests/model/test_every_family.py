"""Every family that Transformers builds: loaded, written and adapted as it is, or refused by name.

`benchmarks/families.py` is the same over all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from every_family import ATTEND_BOTH_WAYS, REFUSED, write_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.errors import GraftError
from graft.formats.registry import make_format
from graft.model.load import load_model
from graft.model.save import save_model
from graft.model.targets import freeze_layers, kept_layers, select_targets

# One of each kind of buffer, mixer, router, head and way of sharing.
SOME = [
    "bloom", "deepseek_v3", "falcon", "falcon_h1", "gemma3n_text", "gpt_oss", "jamba", "lfm2",
    "llama4_text", "mamba", "mamba2", "mixtral", "nemotron_h", "phimoe", "qwen3_next",
    "recurrent_gemma", "rwkv", "xglm", "zamba",
]  # fmt: skip
TOKENS = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(1))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("family", SOME)
def test_it_is_what_transformers_loads(family, tiny_base, tmp_path) -> None:
    folder = tmp_path / "model"
    write_tiny(family, folder, tiny_base)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    model = loaded.model
    buffers = dict(expected.named_buffers())
    assert set(buffers) == set(dict(model.named_buffers()))
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name
    found = logits(model)
    assert torch.equal(found, logits(expected))

    save_model(loaded, tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(saved), found, rtol=0, atol=1e-6)

    # Whatever is adapted is used, forward and backward.
    names = select_targets(model, ())
    freeze_layers(model, names)
    attach_adapter(model, names, AdapterConfig(method="lora", rank=2))
    adapters = adapter_parameters(model, "default")
    for parameter in adapters.values():
        parameter.requires_grad_(True)
    torch.testing.assert_close(logits(model), found, rtol=0, atol=1e-5)
    model.train()
    model(input_ids=TOKENS, use_cache=False).logits.logsumexp(-1).sum().backward()
    assert [name for name, parameter in adapters.items() if parameter.grad is None] == []


@pytest.mark.parametrize("family", ["falcon_h1", "llama4_text", "mamba", "rwkv", "zamba"])
def test_it_computes_with_packed_weights(family, tiny_base, tmp_path) -> None:
    write_tiny(family, tmp_path / "model", tiny_base)
    packed = load_model(str(tmp_path / "model"), weight_format=make_format("int8"), device="cpu")
    plain = load_model(str(tmp_path / "model"), device="cpu")
    torch.testing.assert_close(logits(packed.model), logits(plain.model), rtol=0, atol=0.25)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_it_is_refused_by_name(family, tiny_base, tmp_path) -> None:
    # The message is right where it says that a token sees later ones, and nowhere else.
    model = write_tiny(family, tmp_path / "model", tiny_base)
    with pytest.raises(GraftError) as raised:
        load_model(str(tmp_path / "model"), device="cpu")
    message = str(raised.value)
    assert REFUSED[family] in message and message.count("\n") == 1
    if family == "reformer":
        return  # it hashes at random, so that two passes differ by themselves
    changed = TOKENS.clone()
    changed[0, -1] = 7
    with torch.no_grad():
        moved = logits(model)[0, 0] - model(input_ids=changed, use_cache=False).logits[0, 0]
    assert (moved.abs().max() > 1e-4) == (family in ATTEND_BOTH_WAYS)


def test_weights_as_they_were_published_are_refused_with_the_way_out(tiny_base, tmp_path) -> None:
    write_tiny("mixtral", tmp_path / "model", tiny_base, published=True)
    with pytest.raises(GraftError) as raised:
        load_model(str(tmp_path / "model"), device="cpu")
    message = str(raised.value)
    assert "holds its weights as they were published: 24 tensors" in message
    assert "experts.0.w1.weight" in message and "save_original_format=False" in message


@pytest.mark.parametrize(
    ("family", "layer", "reason"),
    [
        ("mamba", "x_proj", "MambaMixer reads its weight itself"),
        ("falcon_h1", "out_proj", "FalconH1Mixer reads its weight itself"),
        ("zamba", "q_proj", "several layers share its weight"),
    ],
)
def test_a_layer_that_is_named_and_cannot_be_adapted(
    family, layer, reason, tiny_base, tmp_path
) -> None:
    write_tiny(family, tmp_path / "model", tiny_base)
    model = load_model(str(tmp_path / "model"), device="cpu").model
    assert {name.rsplit(".", 1)[1] for name in kept_layers(model)} >= {layer}
    with pytest.raises(GraftError, match=f"'{layer}' stays as it is: {reason}"):
        select_targets(model, [layer])
    assert not [name for name in select_targets(model, ()) if name.endswith(f".{layer}")]


def test_biases_of_routers_stay_in_float32(tiny_base, tmp_path) -> None:
    folder: Path = tmp_path / "model"
    write_tiny("deepseek_v3", folder, tiny_base)
    model = load_model(str(folder), dtype="bfloat16", device="cpu").model
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert model.state_dict()[name].dtype == torch.float32
    assert torch.equal(model.state_dict()[name], expected.state_dict()[name])
    assert torch.equal(logits(model), logits(expected))
