"""Folders that version a5f4af3 wrote load, merge, and train on as they did there.

tests/fixtures/make_a5f4af3.py wrote them. Float sums come out otherwise where a processor adds in
another order, so bits are compared where the arithmetic is that of the machine that wrote them:
the same instruction set in graft's kernels, and the same gradients of the plain model in PyTorch.
Elsewhere results are compared within TOLERANCE of the largest number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import graft
from graft.api.run.folder import read_run_config
from graft.kernels.backend.native_library import instructions, native
from graft.train.metrics import read_metrics

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "a5f4af3"
WRITTEN_IN = "/tmp/a5f4af3"
IDS = torch.arange(40).reshape(2, 20) % 18 + 1
TOLERANCE = 1e-5


def names(kind: str) -> list[str]:
    found = sorted(path.name for path in (FIXTURE / kind).iterdir())
    assert found, f"the fixture holds no {kind}"
    return found


RUNS, ADAPTERS, QUANTISED = names("runs"), names("adapters"), names("quantised")


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """The fixture where it may be written to: begun/NAME, runs/NAME (ended), and the rest."""
    root = tmp_path_factory.mktemp("old") / "a5f4af3"
    shutil.copytree(FIXTURE, root, ignore=shutil.ignore_patterns("runs"))
    for name in RUNS:
        shutil.copytree(FIXTURE / "runs" / name / "begun", root / "begun" / name)
        for part in ("begun", "ended"):
            shutil.copytree(
                FIXTURE / "runs" / name / part, root / "runs" / name, dirs_exist_ok=True
            )
    for path in root.rglob("*"):
        if path.suffix in (".json", ".yaml", ".md"):
            path.write_text(path.read_text("utf-8").replace(WRITTEN_IN, str(root)), "utf-8")
    return root


@pytest.fixture(scope="module")
def about() -> dict:
    return json.loads((FIXTURE / "expected.json").read_text())


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(FIXTURE / "expected.safetensors")


@pytest.fixture(scope="module")
def same_arithmetic(about) -> bool:
    """Whether this machine computes the bits that the fixture's did."""
    model = AutoModelForCausalLM.from_pretrained(FIXTURE / "base", attn_implementation="eager")
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    digest = hashlib.sha256(loss.detach().numpy().tobytes())
    for _, parameter in sorted(model.named_parameters()):
        digest.update(parameter.grad.numpy().tobytes())
    return (instructions(), digest.hexdigest()) == (about["instructions"], about["arithmetic"])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def logits(path: Path) -> torch.Tensor:
    model, _ = graft.load(path, device="cpu")
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def assert_same(found: torch.Tensor, expected: torch.Tensor, bits: bool) -> None:
    difference = (found.double() - expected.double()).abs().max()
    assert found.dtype == expected.dtype
    assert difference <= (0 if bits else TOLERANCE * expected.abs().max())


def test_bits_are_compared_here(same_arithmetic, about):
    if not same_arithmetic:
        pytest.skip(
            f"{instructions()} and this PyTorch round otherwise than {about['instructions']} and "
            f"PyTorch {about['torch']}: folders of a5f4af3 were compared within {TOLERANCE:g}"
        )


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_folder(old, expected, same_arithmetic, name):
    found = logits(old / "quantised" / name)
    assert_same(found, expected[f"quantised/{name}"], same_arithmetic)


@pytest.mark.parametrize("name", QUANTISED)
def test_quantize_writes_the_same_folder(old, same_arithmetic, tmp_path, name):
    """A file format may change, but not by accident: change this test with it."""
    before, now = old / "quantised" / name, tmp_path / "now"
    layer = next(iter(json.loads((before / "graft.json").read_text())["layers"].values()))
    config = {key: layer[key] for key in ("format", "bits", "double_quant") if key in layer}
    config["device"] = "cpu"
    if "dtype" in layer:
        config["latent_dtype"] = layer["dtype"]
    graft.quantize(graft.QuantizeConfig(model=str(old / "base"), out=str(now), **config))
    described = json.loads((now / "graft.json").read_text())
    assert described.pop("sha256") == {"model.safetensors": digest(now / "model.safetensors")}
    assert described == json.loads((before / "graft.json").read_text())
    found, expected = (load_file(folder / "model.safetensors") for folder in (now, before))
    assert found.keys() == expected.keys()
    if same_arithmetic:
        weights = [(folder / "model.safetensors").read_bytes() for folder in (now, before)]
        assert weights[0] == weights[1]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_peft(old, expected, same_arithmetic, tmp_path, name):
    graft.adopt(old / "adapters" / name, tmp_path / "run")
    assert_same(logits(tmp_path / "run"), expected[f"adapters/{name}"], same_arithmetic)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_ended(old, expected, same_arithmetic, name):
    assert_same(logits(old / "runs" / name), expected[f"runs/{name}"], same_arithmetic)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "full"])
def test_a_run_merges(old, expected, about, same_arithmetic, tmp_path, name):
    merged = tmp_path / "merged"
    graft.merge(old / "runs" / name, merged, device="cpu")
    assert_same(logits(merged), expected[f"merged/{name}"], same_arithmetic)
    if same_arithmetic:
        weights = (merged / "model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == about["merged"][name]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_interrupted_goes_on(old, same_arithmetic, tmp_path, name, monkeypatch):
    # What takes the gradient of qalora's scales of rounded numbers is younger than these runs.
    monkeypatch.delitem(native.operations, "grad_factors", raising=False)
    run, ended = tmp_path / "run", old / "runs" / name
    shutil.copytree(old / "begun" / name, run)
    assert read_run_config(run).batching == "padded", "there was no other way of batching"
    graft.finetune(dataclasses.replace(read_run_config(run), out=str(run), resume=True))
    kind = "model/model" if name == "full" else "adapter/adapter_model"
    found, expected = (load_file(folder / f"{kind}.safetensors") for folder in (run, ended))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_same(found[key], tensor, same_arithmetic)
    for path in (ended / "adapter").glob("*.json"):
        text = (run / "adapter" / path.name).read_text().replace(str(run), str(ended))
        described = json.loads(text)
        described.pop("sha256", None)  # which earlier versions did not write
        earlier = json.loads(path.read_text())
        for one in (described, earlier):  # they named the run's own copy of the base
            one.pop("base", None)
            one.pop("base_model_name_or_path", None)
        assert described == earlier, path.name
    metrics = [read_metrics(folder / "metrics.jsonl") for folder in (run, ended)]
    assert [entry["step"] for entry in metrics[0]] == [entry["step"] for entry in metrics[1]]
    for one, other in zip(*metrics, strict=True):
        for key in one.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert one[key] == pytest.approx(other[key], rel=0 if same_arithmetic else TOLERANCE)
