"""Folders that graft writes: who can read them, what is in them, and what a failure leaves."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft.adapters.attach import attach_adapter, frozen_layers
from graft.adapters.config import AdapterConfig
from graft.adapters.merge import merge_adapters
from graft.errors import GraftError
from graft.files.write import new_folder, write_json
from graft.formats.base import storage_bytes
from graft.formats.registry import describe_format, make_format
from graft.model import save
from graft.model.folder import FORMAT_VERSION
from graft.model.load import load_model
from graft.model.save import save_model
from graft.model.targets import freeze_layers, select_targets

FORMATS = [
    ("int", {"bits": 4, "group_size": 32}),
    ("int", {"bits": 3, "group_size": 8, "statistics": "float32"}),
    ("nf4", {"double_quant": True}),
    ("fp4", {}),
    ("int8", {}),
]


def reload(folder: Path, dtype: str = "float32"):
    return load_model(str(folder), dtype=dtype, device="cpu")


def data_bytes(file: Path) -> int:
    """The bytes of a safetensors file after its header."""
    content = file.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gemma", "gpt2"])
def test_a_plain_folder_is_one_for_transformers(family, load, logits, tmp_path) -> None:
    loaded = load(family)
    save_model(loaded, tmp_path / "plain")
    assert not (tmp_path / "plain" / "graft.json").exists()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto").eval()
    assert theirs.dtype == torch.float32
    assert torch.equal(logits(theirs), logits(loaded.model))
    assert torch.equal(logits(reload(tmp_path / "plain").model), logits(loaded.model))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer("red lamp").input_ids == loaded.tokenizer("red lamp").input_ids


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_dense_frozen_layers_are_written_as_their_modules_had_them(
    family, load, checkpoint, tmp_path
) -> None:
    loaded = load(family)
    freeze_layers(loaded.model, select_targets(loaded.model, ()))
    save_model(loaded, tmp_path / "plain")
    source = load_file(checkpoint(family) / "model.safetensors")
    written = load_file(tmp_path / "plain" / "model.safetensors")
    assert set(written) == set(source)
    assert all(torch.equal(written[name], tensor) for name, tensor in source.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_plain_folder_in_another_dtype(dtype, load, tmp_path) -> None:
    save_model(load("llama"), tmp_path / "plain", dtype)
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    assert theirs.dtype == dtype


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gemma3", "gpt2"])
@pytest.mark.parametrize(("name", "options"), FORMATS)
def test_a_quantised_folder_loads_bit_for_bit(
    family, name, options, load, logits, tmp_path
) -> None:
    loaded = load(family, weight_format=make_format(name, options))
    save_model(loaded, tmp_path / "q")
    again = reload(tmp_path / "q")
    before, after = loaded.model.state_dict(), again.model.state_dict()
    assert list(before) == list(after)
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    assert torch.equal(logits(again.model), logits(loaded.model))
    assert again.source_dtype == loaded.source_dtype


def test_some_layers_quantised_and_some_not(load, logits, tmp_path) -> None:
    loaded = load("gpt2", weight_format=make_format("int"), targets=("mlp.c_fc",))
    freeze_layers(loaded.model, select_targets(loaded.model, ["c_attn"]))
    save_model(loaded, tmp_path / "q")
    again = reload(tmp_path / "q")
    assert len(list(frozen_layers(again.model))) == 2
    torch.testing.assert_close(logits(again.model), logits(loaded.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int", "nf4"])
def test_transformers_refuses_a_quantised_folder(name, load, tmp_path) -> None:
    save_model(load("llama", weight_format=make_format(name)), tmp_path / "q")
    with pytest.raises(ValueError, match="quant"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q")


@pytest.mark.parametrize(("name", "options"), FORMATS)
def test_packed_tensors_of_a_16_bit_source_are_kept_as_they_are(
    name, options, checkpoint, logits, tmp_path
) -> None:
    """NF4's absmax is float32 by definition, even where bfloat16 would hold its values."""
    weight_format = make_format(name, options)
    folder = str(checkpoint("qwen2", torch.bfloat16))
    loaded = load_model(folder, weight_format=weight_format, dtype="float32", device="cpu")
    save_model(loaded, tmp_path / "q")
    assert torch.equal(logits(reload(tmp_path / "q").model), logits(loaded.model))


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_not_quantised_keeps_the_sources_dtype(source, checkpoint, tmp_path) -> None:
    folder = checkpoint("qwen2", source)
    original = load_file(folder / "model.safetensors")
    loaded = load_model(
        str(folder), weight_format=make_format("int"), dtype="float32", device="cpu"
    )
    save_model(loaded, tmp_path / "q")
    written = load_file(tmp_path / "q" / "model.safetensors")
    kept = [name for name in written if name in original]
    # Embedding, last norm, and in each of 2 blocks 2 norms and 3 biases.
    assert len(kept) >= 2 + 2 * 5
    for name in kept:
        assert written[name].dtype == source
        assert torch.equal(written[name], original[name])
    assert reload(tmp_path / "q").source_dtype == source
    assert json.loads((tmp_path / "q" / "config.json").read_text())["dtype"] == str(source)[6:]


def test_a_merged_weight_is_not_narrowed_with_loss(checkpoint, logits, tmp_path) -> None:
    folder = checkpoint("llama", torch.bfloat16)
    loaded = load_model(
        str(folder), weight_format=make_format("nf4"), dtype="float32", device="cpu"
    )
    names = select_targets(loaded.model, ["q_proj"])
    attach_adapter(loaded.model, names, AdapterConfig(method="lora", rank=2))
    with torch.no_grad():
        for name in names:
            loaded.model.get_submodule(name).adapter("default").B.normal_(std=0.1)
    merge_adapters(loaded.model)
    save_model(loaded, tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert written[names[0] + ".weight"].dtype == torch.float32
    assert written["model.norm.weight"].dtype == torch.bfloat16
    assert torch.allclose(
        logits(reload(tmp_path / "merged").model), logits(loaded.model), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("name", "options"), FORMATS)
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_storage_is_exact_to_the_byte(family, name, options, load, checkpoint, tmp_path) -> None:
    weight_format = make_format(name, options)
    loaded = load(family, weight_format=weight_format)
    save_model(loaded, tmp_path / "q")
    frozen = dict(frozen_layers(loaded.model))
    packed = sum(
        storage_bytes(weight_format, layer.out_features, layer.in_features)
        for layer in frozen.values()
    )
    assert packed == sum(layer.storage_bytes for layer in frozen.values())
    source = load_file(checkpoint(family) / "model.safetensors")
    weights = {f"{layer}.weight" for layer in frozen}
    rest = sum(4 * tensor.numel() for key, tensor in source.items() if key not in weights)
    assert data_bytes(tmp_path / "q" / "model.safetensors") == packed + rest


def test_the_container_names_its_version_and_formats(load, tmp_path) -> None:
    weight_format = make_format("int", {"bits": 2, "group_size": 16})
    save_model(load("llama", weight_format=weight_format, targets=("up_proj",)), tmp_path / "q")
    assert json.loads((tmp_path / "q" / "graft.json").read_text()) == {
        "format_version": FORMAT_VERSION,
        "source_dtype": "float32",
        "sha256": {
            "model.safetensors": sha256(
                (tmp_path / "q" / "model.safetensors").read_bytes()
            ).hexdigest()
        },
        "layers": {
            f"model.layers.{number}.mlp.up_proj": describe_format(weight_format)
            for number in (0, 1)
        },
    }


def test_equal_models_give_equal_files(load, tmp_path) -> None:
    for number in (0, 1):
        save_model(load("llama", weight_format=make_format("nf4")), tmp_path / str(number))
    for file in sorted(path.name for path in (tmp_path / "0").iterdir()):
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes(), file


def test_a_model_with_adapters_is_not_saved(load, tmp_path) -> None:
    loaded = load("llama", weight_format=make_format("int"))
    names = select_targets(loaded.model, ["q_proj"])
    attach_adapter(loaded.model, names, AdapterConfig(method="qalora", rank=2))
    with pytest.raises(GraftError, match="merge or remove"):
        save_model(loaded, tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["save_tensors", "write_model_files", "write_json"])
def test_a_failure_in_the_middle_leaves_nothing(step, load, monkeypatch, tmp_path) -> None:
    loaded = load("llama", weight_format=make_format("int"))

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(save, step, fail)
    with pytest.raises(GraftError, match=r"q cannot be written: No space left on device"):
        save_model(loaded, tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path) -> None:
    def write_and_stop() -> None:
        with new_folder(tmp_path / "deep" / "out") as part:
            (part / "a").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert list((tmp_path / "deep").iterdir()) == []


@contextmanager
def small_disk() -> Iterator[None]:
    """No file may grow beyond 64 KB, which fails in the very write of the tensors.

    Around that write alone: pytest's own output may go to a file that is longer already.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told(load, tmp_path) -> None:
    loaded = load("llama")
    with small_disk(), pytest.raises(GraftError, match="cannot be written"):
        save_model(loaded, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "full folder"])
def test_what_exists_is_not_overwritten(kind, load, tmp_path) -> None:
    out = tmp_path / "out"
    precious = out if kind == "file" else out / "precious"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("mine")
    with pytest.raises(GraftError, match="exists already"):
        save_model(load("llama"), out)
    assert precious.read_text() == "mine"
    assert sorted(tmp_path.rglob("*")) == sorted({out, precious})


def test_an_empty_folder_and_the_rest_of_a_broken_write_are_taken(load, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    left = tmp_path / ".out.0123456789ab.part"
    left.mkdir()
    (left / "junk").write_text("junk")
    save_model(load("llama"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "junk").exists()


def test_a_place_that_cannot_be_written(load, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GraftError, match="cannot be written"):
        save_model(load("llama"), tmp_path / "file" / "out")


def test_a_json_file_is_replaced_whole(tmp_path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
