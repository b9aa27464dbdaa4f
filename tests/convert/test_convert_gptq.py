from __future__ import annotations

import functools
import json

import pytest
import torch
from foreign import change_settings, change_tensors, foreign_folder, gptq_layer, gptq_weight

import graft
from graft.adapters.attach import frozen_layers
from graft.errors import GraftError
from graft.formats.int_group import IntGroupFormat

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def make(tiny_base, tmp_path):
    def write(bits=4, group_size=32, symmetric=False, layout="gptq", **settings):
        settings = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": False,
            "checkpoint_format": layout,
        } | settings
        layer = gptq_layer(bits, group_size, symmetric, layout == "gptq")
        return foreign_folder(tiny_base, tmp_path / "theirs", settings, layer)

    return write


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_and_layout(bits, layout, make, assert_converted):
    weight = functools.partial(gptq_weight, bits=bits, minus_one=layout == "gptq")
    # -z s has 11 bits more than z, of which fp16 keeps 11 and rounds half of the last one.
    report = assert_converted(make(bits, layout=layout), weight, 2.0 ** (bits - 11))
    assert report.kind == f"GPTQ ({layout})"
    assert report.layers == {f"int, {bits} bits, groups of 32": 14}
    assert report.bits_per_weight == bits + 1


@pytest.mark.parametrize("bits", [2, 4])
def test_symmetric_weights_are_the_very_same(bits, make, assert_converted):
    weight = functools.partial(gptq_weight, bits=bits)
    assert assert_converted(make(bits, symmetric=True), weight, 0.0).rounding == 0.0


@pytest.mark.parametrize(("group_size", "held"), [(-1, (64, 32)), (64, (64,)), (16, (16,))])
def test_groups_are_cut_where_the_int_format_has_no_such_size(
    group_size, held, make, assert_converted
):
    """A row of 96 inputs is cut into groups of 32, one of 64 stays."""
    weight = functools.partial(gptq_weight, bits=4)
    report = assert_converted(make(4, group_size), weight, 2.0**-7)
    assert set(report.layers) == {f"int, 4 bits, groups of {size}" for size in held}


def test_what_is_written_is_what_saving_the_model_writes(make, tmp_path):
    graft.convert_model(make(), tmp_path / "out")
    model, tokenizer = graft.load(tmp_path / "out")
    from graft.model.load import LoadedModel, load_model
    from graft.model.save import save_model

    loaded: LoadedModel = load_model(str(tmp_path / "out"))
    save_model(loaded, tmp_path / "again")
    for file in sorted((tmp_path / "again").iterdir()):
        if file.suffix == ".json":
            ours = json.loads((tmp_path / "out" / file.name).read_text())
            saved = json.loads(file.read_text())
            for described in (ours, saved):  # their tensors lie in another order
                described.pop("sha256", None)
            assert ours == saved, file.name
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        p.name for p in (tmp_path / "again").iterdir()
    }


def test_settings_of_an_older_folder_lie_in_a_file_of_their_own(make, tmp_path):
    folder = make()
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(
        json.dumps({key: settings[key] for key in ("bits", "group_size", "desc_act")})
    )
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    assert graft.convert_model(folder, tmp_path / "out").kind == "GPTQ (gptq)"


def test_a_zero_scale_becomes_a_positive_one_with_the_same_weights(make, tmp_path):
    folder = make()
    change_tensors(folder, lambda tensors: tensors[f"{LAYER}.scales"][0].zero_())
    assert graft.convert_model(folder, tmp_path / "out").rounding < 2.0**-7
    layer = dict(frozen_layers(graft.load(tmp_path / "out", dtype="float32")[0]))[LAYER]
    assert bool((layer.packed["scales"] > 0).all())
    assert not layer.dense_weight()[:, :32].any() and bool(layer.dense_weight()[:, 32:].any())


def test_layers_may_have_widths_of_their_own(tiny_base, make, tmp_path):
    folder = make()
    from safetensors.torch import load_file

    weight = load_file(tiny_base / "model.safetensors")[f"{LAYER}.weight"]
    parts = gptq_layer(2, 16)(LAYER, weight)
    change_tensors(
        folder,
        lambda tensors: tensors.update(
            {f"{LAYER}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        ),
    )
    graft.convert_model(folder, tmp_path / "out")
    layers = dict(frozen_layers(graft.load(tmp_path / "out")[0]))
    assert layers[LAYER].weight_format == IntGroupFormat(2, 16)


def test_groups_of_odd_sizes_are_refused(make, tmp_path):
    """12 groups of 8 of the 96 inputs can be held, 24 of 4 cannot."""
    folder = make()
    layer = "model.layers.0.mlp.down_proj"

    def cut(tensors):
        for part in ("scales", "qzeros"):
            tensors[f"{layer}.{part}"] = tensors[f"{layer}.{part}"].repeat_interleave(8, 0)
        tensors[f"{layer}.g_idx"] = torch.arange(96, dtype=torch.int32) // 4

    change_tensors(folder, cut)
    with pytest.raises(GraftError, match=f"{layer}: its groups are of 4 inputs; graft holds"):
        graft.convert_model(folder, tmp_path / "out")


def by_activation(tensors):
    tensors[f"{LAYER}.g_idx"] = tensors[f"{LAYER}.g_idx"].flip(0).contiguous()


def without(key):
    return lambda tensors: tensors.pop(f"{LAYER}.{key}")


def replaced(key, value):
    return lambda tensors: tensors.update({f"{LAYER}.{key}": value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (by_activation, f"{LAYER}: its inputs are grouped by activation order"),
        (without("qzeros"), f"tensor {LAYER}.qzeros is missing"),
        (without("scales"), f"tensor {LAYER}.scales is missing"),
        (replaced("qweight", torch.zeros(10, 64, dtype=torch.int32)), "5 bits each; graft reads"),
        (replaced("qweight", torch.zeros(8, 32, dtype=torch.int32)), r"expected int32 or uint32"),
        (replaced("scales", torch.ones(2, 64).int()), "scales is int32"),
        (replaced("scales", torch.full((2, 64), 1e9)), "not finite in float16"),
        (replaced("bias", torch.ones(64)), "bias is not zero"),
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.ones(3, 64)}),
            r"embed_tokens.weight has shape \[3, 64\]; config.json makes it",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_stays(change, words, make, tmp_path):
    folder = make()
    change_tensors(folder, change)
    with pytest.raises(GraftError, match=words):
        graft.convert_model(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_all_problems_come_at_once(make, tmp_path):
    folder = make()
    change_tensors(folder, lambda t: (without("qzeros")(t), t.pop("model.norm.weight")))
    with pytest.raises(GraftError, match="2 problems"):
        graft.convert_model(folder, tmp_path / "out")


def test_activation_order_without_its_index_is_refused(make, tmp_path):
    folder = make(desc_act=True)
    change_tensors(folder, lambda t: [t.pop(key) for key in list(t) if key.endswith("g_idx")])
    with pytest.raises(GraftError, match="desc_act"):
        graft.convert_model(folder, tmp_path / "out")
    change_settings(folder, static_groups=True)
    graft.convert_model(folder, tmp_path / "out")


def test_another_layout_is_refused_by_name(make, tmp_path):
    with pytest.raises(GraftError, match="checkpoint_format is 'marlin'; graft reads gptq and"):
        graft.convert_model(make(layout="marlin"), tmp_path / "out")


def test_tensors_without_a_place_are_named(make, tmp_path):
    folder = make()
    freqs = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda t: t.update({freqs: torch.ones(8)}))
    assert graft.convert_model(folder, tmp_path / "out").left_out == (freqs,)


def test_a_bias_of_zeros_is_left_out(make, tmp_path):
    folder = make()
    change_tensors(folder, replaced("bias", torch.zeros(64)))
    assert graft.convert_model(folder, tmp_path / "out").left_out == (f"{LAYER}.bias",)


def test_a_tensor_that_may_change_the_result_is_not_left_out(make, tmp_path):
    folder = make()
    scales = "model.layers.0.mlp.act.scales"
    change_tensors(folder, lambda t: t.update({scales: torch.ones(8)}))
    with pytest.raises(GraftError, match=f"{scales} is not zero"):
        graft.convert_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
