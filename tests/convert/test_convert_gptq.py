from __future__ import annotations

import functools
import json

import pytest
import torch
from foreign import change_tensors, foreign_folder, gptq_layer, gptq_weight
from safetensors.torch import load_file

import graft
from graft.adapters.attach import frozen_layers
from graft.convert.config import ConvertConfig
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
    assert report.kind == f"GPTQ ({'v2' if layout == 'gptq_v2' else 'v1'})"
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
    report = graft.convert_model(folder, tmp_path / "out")
    assert report.kind == "GPTQ (v1)"
    assert any("its settings are those of quantize_config.json" in note for note in report.notes)


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
    report = graft.convert_model(folder, tmp_path / "out")
    layers = dict(frozen_layers(graft.load(tmp_path / "out")[0]))
    assert layers[LAYER].weight_format == IntGroupFormat(2, 16)
    assert "settings say 4 bits, and there are tensors of 2, as read" in report.notes


def without(key):
    return lambda tensors: tensors.pop(f"{LAYER}.{key}")


def replaced(key, value):
    return lambda tensors: tensors.update({f"{LAYER}.{key}": value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("qzeros"), f"tensor {LAYER}.qzeros is missing"),
        (without("scales"), f"tensor {LAYER}.scales is missing"),
        (replaced("qweight", torch.zeros(9, 64, dtype=torch.int32)), "4.5 bits each; graft reads"),
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


@pytest.fixture
def made_as(tiny_base, tmp_path):
    """Return a folder whose zero points are stored in one way and called another."""

    def write(way, label, bits=4, symmetric=False, **settings):
        layer = gptq_layer(bits, 32, symmetric, way != "v2", way == "words")
        named = {"quant_method": "gptq", "bits": bits, "group_size": 32}
        named |= {} if label is None else {"checkpoint_format": label}
        return foreign_folder(tiny_base, tmp_path / "theirs", named | settings, layer)

    return write


@pytest.mark.parametrize(
    ("bits", "way", "label"),
    [
        *((4, "v1", "gptq_v2"), (3, "v1", "gptq"), (2, "v1", None)),
        *((4, "v2", "gptq"), (3, "v2", None), (2, "v2", "gptq_v2")),
        *((4, "words", None), (3, "words", "gptq"), (2, "words", "gptq_v2")),
    ],
)
def test_zero_points_are_read_as_the_weights_show(way, label, bits, made_as, logits, tmp_path):
    """One folder for each: the same codes and scales, so the same weights however they are told."""
    folder = made_as(way, label, bits)
    report = graft.convert_model(folder, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    model, _ = graft.load(tmp_path / "out", dtype="float32")
    for name, layer in frozen_layers(model):
        words = tensors[f"{name}.qzeros"].numpy().view("uint32")
        if way == "words":
            tensors[f"{name}.qzeros"] = torch.from_numpy(words_plus_one(words, bits))
        weight = gptq_weight(tensors, name, bits, minus_one=way == "v1")
        step = layer.packed["scales"].double().repeat_interleave(32, -1)
        found = layer.dense_weight(torch.float32).double()
        assert ((found - weight).abs() / step).max() <= 2.0 ** (bits - 11)
    version = "v2" if way == "v2" else "v1"
    assert report.kind == f"GPTQ ({version})"
    said = {"gptq": "v1", "gptq_v2": "v2", None: None}[label]
    told = "and as its weights show" if said == version else f"--gptq-zeros {other(version)} reads"
    assert told in report.notes[0]


def words_plus_one(words, bits):
    import numpy as np
    from foreign import stream

    ones = stream(np.ones((len(words), 32 * words.shape[1] // bits), int), bits)
    return (words + ones).view(np.int32)


def other(version):
    return {"v1": "v2", "v2": "v1"}[version]


@pytest.mark.parametrize(("bits", "label"), [(3, "gptq"), (4, "gptq"), (8, "gptq"), (8, None)])
def test_symmetric_zero_points_are_half_of_the_range(label, bits, made_as, tmp_path):
    report = graft.convert_model(made_as("v2", label, bits, True), tmp_path / "out")
    assert report.kind == "GPTQ (v2)" and report.rounding == 0.0


def test_who_asks_decides(made_as, tmp_path):
    folder = made_as("v1", "gptq_v2")
    asked = ConvertConfig(gptq_zeros="v2")
    report = graft.convert_model(folder, tmp_path / "out", config=asked)
    assert report.kind == "GPTQ (v2)"
    assert "as asked (--gptq-zeros), though its weights look like v1" in report.notes[0]


def test_wide_codes_show_nothing_and_then_the_label_counts(made_as, tmp_path):
    """A step of 8 bits is less than what the mean of a few small layers is off by chance."""
    report = graft.convert_model(made_as("v1", "gptq", 8), tmp_path / "out")
    assert report.kind == "GPTQ (v1)"
    assert "as its settings say v1; its weights do not show it" in report.notes[0]


@pytest.mark.parametrize("separate", [None, {"checkpoint_format": "gptq", "bits": 8}])
def test_without_a_label_wide_codes_need_to_be_asked_for(separate, made_as, tmp_path):
    """Two files that contradict each other say nothing either."""
    folder = made_as("v2", "gptq_v2" if separate else None, 8)
    if separate:
        (folder / "quantize_config.json").write_text(json.dumps(separate))
    with pytest.raises(GraftError, match="say it with --gptq-zeros v1"):
        graft.convert_model(folder, tmp_path / "out")
    report = graft.convert_model(folder, tmp_path / "out", config=ConvertConfig(gptq_zeros="v2"))
    assert report.kind == "GPTQ (v2)"


def test_a_folder_of_which_nothing_is_said_is_known_by_its_tensors(made_as, tmp_path):
    folder = made_as("v2", None)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    report = graft.convert_model(folder, tmp_path / "out")
    assert report.kind == "GPTQ (v2)"
    assert any("known by its tensors alone" in note for note in report.notes)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"is_marlin_format": True}, "is_marlin_format is True"),
        ({"pack_dtype": "int64"}, "pack_dtype is 'int64'; graft reads int32"),
        ({"adapter": {"name": "lora", "rank": 8}}, "an adapter is added to the weights"),
        ({"act_bits": 8}, "act_bits is 8: inputs are rounded too"),
        ({"dynamic": {"+:.*q_proj": {"adapter": {"rank": 2}}}}, "dynamic, .*q_proj.*adapter is"),
        ({"dynamic": [1]}, r"dynamic is \[1\]; expected settings by layer"),
    ],
)
def test_settings_that_change_the_weights_are_refused(settings, words, made_as, tmp_path):
    with pytest.raises(GraftError, match=words):
        graft.convert_model(made_as("v1", "gptq", **settings), tmp_path / "out")


def test_settings_that_nobody_knows_are_told(made_as, tmp_path):
    known = {"damp_percent": 0.1, "true_sequential": True, "meta": {"quantizer": ["x"]}}
    dynamic = {"-:.*k_proj": {}, "+:.*q_proj": {"bits": 4, "group_size": 32}}
    folder = made_as("v1", "gptq", twist=3, dynamic=dynamic, **known)
    notes = graft.convert_model(folder, tmp_path / "out").notes
    assert [note for note in notes if "not read" in note] == [
        "settings that graft does not know were not read: twist"
    ]
