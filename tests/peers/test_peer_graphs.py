"""ONNX Runtime and OpenVINO run what graft exports: same integers, logits and continuations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graft.adapters.attach import frozen_layers
from graft.export.onnx.write import export_onnx
from graft.export.openvino.write import export_openvino
from graft.formats.int_group import IntGroupFormat
from graft.model.gguf.layout import head_dim
from graft.model.load import load_model

RUNTIMES = ("onnx", "openvino")
CASES = [
    ("babyllama-361-1m", 4, 32),
    ("babyllama-361-1m", 3, 32),
    ("babyllama-361-1m", 2, 32),
    ("babyllama-361-1m", None, None),
    ("stories260k", 4, 32),
    ("mixed-13m", 4, 64),
]
Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def started(runtime: str, folder: Path) -> Run:
    if runtime == "onnx":
        onnxruntime = pytest.importorskip(
            "onnxruntime", reason="needs onnxruntime: make test-peers installs it"
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))
    openvino = pytest.importorskip("openvino", reason="needs openvino: make test-peers installs it")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(folder / "openvino_model.xml"), "CPU", settings)
    request = compiled.create_infer_request()

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """It keeps its cache itself, until a text begins anew."""
        feeds = {name: value for name, value in inputs.items() if "past" not in name}
        if inputs["attention_mask"].shape == inputs["input_ids"].shape:
            request.reset_state()
        rows = np.arange(len(inputs["input_ids"]), dtype=np.int32)
        return {"logits": request.infer(feeds | {"beam_idx": rows})["logits"].copy()}

    return run


def written(runtime: str, loaded: Any, folder: Path) -> None:
    if runtime == "onnx":
        pytest.importorskip("onnx", reason="needs onnx: make test-peers installs it")
        export_onnx(loaded, folder)
    else:
        pytest.importorskip("openvino", reason="needs openvino: make test-peers installs it")
        export_openvino(loaded, folder)


def inputs_of(config, ids: torch.Tensor, mask=None, past=None) -> dict[str, np.ndarray]:
    """The inputs for more tokens behind a cache, or for a whole text."""
    if mask is None:
        mask = torch.ones_like(ids)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    found = {name: value.numpy() for name, value in feeds.items()}
    for layer in range(config.num_hidden_layers):
        for kind in ("key", "value"):
            shape = (len(ids), config.num_key_value_heads, 0, head_dim(config))
            empty = np.zeros(shape, np.float32)
            present = f"present.{layer}.{kind}"
            found[f"past_key_values.{layer}.{kind}"] = (past or {}).get(present, empty)
    return found


def logits_of(run: Run, config, ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(run(inputs_of(config, ids))["logits"]).double()


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request):
    return request.param


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-bit")
def exported(request, runtime, shared_models, tmp_path_factory):
    name, bits, group_size = request.param
    weight_format = None if bits is None else IntGroupFormat(bits, group_size)
    loaded = load_model(str(shared_models / name), weight_format=weight_format, dtype="float32")
    folder = tmp_path_factory.mktemp(runtime) / name
    written(runtime, loaded, folder)
    return loaded.model, loaded.tokenizer, started(runtime, folder), folder


def test_logits(exported, stories, first_ids):
    model, tokenizer, run, _ = exported
    batch = first_ids(tokenizer, stories[:10], 128)
    with torch.no_grad():
        ours = model(batch).logits.double()
    difference = (ours - logits_of(run, model.config, batch)).abs().max()
    assert difference <= 2e-5 * ours.abs().max()  # asked: 2e-3


def test_greedy_continuations(exported, stories, first_ids):
    """Where each next token of a greedy text is theirs too, so is the text that they would make."""
    model, tokenizer, run, _ = exported
    batch = first_ids(tokenizer, stories[:20], 16)
    assert len(batch) == 20
    made = model.generate(batch, max_new_tokens=64, do_sample=False, eos_token_id=None)
    found = logits_of(run, model.config, made)[:, 15:-1].argmax(-1)
    assert torch.equal(found, made[:, 16:])


def test_a_cache_and_padding_change_nothing(exported, stories, first_ids):
    """The first 20 tokens, then the others; the second row padded on the left."""
    model, tokenizer, run, _ = exported
    batch = first_ids(tokenizer, stories[:10], 48)[:2]
    padded = batch.clone()
    padded[1] = torch.cat([batch[1, :1].expand(7), batch[1, :-7]])
    mask = torch.ones_like(padded)
    mask[1, :7] = 0
    first = run(inputs_of(model.config, padded[:, :20], mask[:, :20]))
    second = run(inputs_of(model.config, padded[:, 20:], mask, past=first))
    with torch.no_grad():
        ours = model(batch).logits
    together = torch.from_numpy(np.concatenate([first["logits"], second["logits"]], 1))
    bound = 2e-5 * ours.abs().max()
    assert (together[0] - ours[0]).abs().max() <= bound
    assert (together[1, 7:] - ours[1, :-7]).abs().max() <= bound


def test_weights_to_float32_rounding(exported, runtime, readers):
    """From the file itself: w = (q - z) s; OpenVINO has short groups as float32."""
    model, _, _, folder = exported
    found = readers.read_weights(runtime, folder, model.config)
    for name, layer in frozen_layers(model):
        weight = layer.dense_weight(torch.float32)
        short = layer.in_features % layer.weight_format.group_size
        bound = 0.0 if short and runtime == "openvino" else 2.5e-7 * weight.abs().max()
        assert (found[name] - weight).abs().max() <= bound
    if not list(frozen_layers(model)):
        head = model.get_submodule("model.layers.0.mlp.up_proj").weight
        assert torch.equal(found["model.layers.0.mlp.up_proj"], head)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(
    "name",
    [
        *("llama3-rope", "tied-llama", "mistral", "mistral-window", "qwen2", "qwen3", "gemma"),
        *("yarn-mistral", "yarn-qwen2"),
    ],
)
def test_architectures(name, bits, runtime, tiny_loaded, tmp_path):
    loaded = tiny_loaded(name, bits)
    written(runtime, loaded, tmp_path / "out")
    ids = torch.randint(3, 160, (2, 48))
    with torch.no_grad():
        ours = loaded.model(ids).logits.double()
    found = logits_of(started(runtime, tmp_path / "out"), loaded.model.config, ids)
    assert (ours - found).abs().max() <= 2e-5 * ours.abs().max()
