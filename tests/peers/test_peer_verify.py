"""`graft verify` passes what was exported, and nothing else: one changed byte is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
from tokenizers.processors import TemplateProcessing

import graft
import graft.api.verify as verifying
from graft.api.events import Events
from graft.api.export import merge_for_export
from graft.api.run.folder import load_any
from graft.cli.main import main
from graft.data.chat import DEFAULT_CHAT_TEMPLATE
from graft.data.encode import encode_prompt
from graft.export import registry
from graft.export.ollama.chat_probe import render_chat
from graft.export.ollama.go_template import render_go
from graft.export.ollama.write import export_ollama

TARGETS = ("gguf", "mlx", "onnx", "openvino", "hf")
WEIGHTS = {
    "mlx": "model.safetensors",
    "onnx": "model.onnx.data",
    "openvino": "openvino_model.bin",
    "hf": "model.safetensors",
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def run(tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    base = folder / "base"
    shutil.copytree(tiny_base, base)
    (base / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    graft.finetune(
        graft.TrainConfig(
            model=str(base),
            data=str(rows),
            eval_fraction=0.25,
            method="qalora",
            steps=4,
            batch_size=4,
            learning_rate=0.02,
            out=str(folder / "run"),
        )
    )
    return folder / "run"


@pytest.fixture(scope="module", params=TARGETS)
def exported(request: pytest.FixtureRequest, run: Path) -> Iterator[tuple[str, Path]]:
    target = request.param
    module, packages = registry.TARGETS[target].runtime
    for needed in {module, registry.TARGETS[target].package or module}:
        if find_spec(needed) is None:
            pytest.skip(f"needs {packages}: make test-peers installs it")
    path = run.parent / ("m.gguf" if target == "gguf" else f"m-{target}")
    graft.export_model(run, target, path)
    yield target, path


def test_an_export_passes(exported: tuple[str, Path], run: Path, capsys: pytest.CaptureFixture):
    target, path = exported
    assert main(["verify", str(run), str(path)]) == 0
    assert "the file is the trained model" in capsys.readouterr().out
    found = json.loads(path.with_name(path.name + ".verify.json").read_text(encoding="utf-8"))
    assert found["passed"] and found["target"] == target
    assert found["differing_files"] == [] and found["fidelity"]["positions"] > 30
    assert found["fidelity"]["mean_kl"] <= (1e-3 if target == "gguf" else 1e-9)
    assert found["same_template"] and found["same_stop_tokens"] and found["same_tokens"]
    assert target == "gguf" or found["equal_texts"] == found["texts"] > 0
    assert sorted(file.name for file in run.parent.glob(".verify-*")) == []


def flipped(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def text_changed(path: Path, text: str) -> None:
    """Another letter in the first place that the text stands."""
    content = path.read_bytes()
    at = content.index(text.encode()) + len(text) - 1
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def weight(target: str, path: Path) -> None:
    if target == "gguf":
        tensor = next(
            tensor
            for tensor in gguf.GGUFReader(path).tensors
            if tensor.tensor_type is gguf.GGMLQuantizationType.Q4_1
        )
        flipped(path, tensor.data_offset + 5)
    else:
        flipped(path / WEIGHTS[target], -3)


def template(target: str, path: Path) -> None:
    text_changed(path if target == "gguf" else path / "chat_template.jinja", "['content")


def vocabulary(target: str, path: Path) -> None:
    """A token of the vocabulary, whatever its text."""
    if target == "gguf":
        field = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"]
        flipped(path, _place(path, field))
    else:
        content = (path / "tokenizer.json").read_text(encoding="utf-8")
        token = list(json.loads(content)["model"]["vocab"])[-3]
        written = json.dumps(token, ensure_ascii=False)[:-1]
        text_changed(path / "tokenizer.json", written)


def _place(path: Path, field: gguf.ReaderField) -> int:
    """Where the last letter of a token lies in the file."""
    text = bytes(field.parts[field.data[-3]])
    length = len(text).to_bytes(8, "little")
    return path.read_bytes().index(length + text) + 8 + len(text) - 1


@pytest.mark.parametrize("change", [weight, template, vocabulary], ids=lambda one: one.__name__)
def test_one_changed_byte_is_found(
    change: Callable[[str, Path], None],
    exported: tuple[str, Path],
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    target, path = exported
    copy = tmp_path / path.name
    (shutil.copy if path.is_file() else shutil.copytree)(path, copy)
    change(target, copy)
    assert main(["verify", str(run), str(copy)]) == 1
    words = capsys.readouterr()
    assert "the file is the trained model" not in words.out
    broken = change is vocabulary and target != "gguf"  # its merges name a token that is gone
    told = "has no tokenizer that can be loaded" if broken else "is not what the export writes now"
    assert told in words.err


@pytest.mark.parametrize("changed", [None, "Modelfile", "model.gguf"])
def test_a_folder_for_ollama(
    changed: str | None,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verifying, "PROMPTS", 2)
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test-peers installs it")
    folder = tmp_path / "ollama"
    graft.export_model(run, "ollama", folder)
    if changed is not None:
        flipped(folder / changed, -3)
    assert main(["verify", str(run), str(folder)]) == (0 if changed is None else 1)
    told = f"{changed} is not what the export writes now"
    assert (told in capsys.readouterr().err) is (changed is not None)
    found = json.loads((tmp_path / "ollama.verify.json").read_text(encoding="utf-8"))
    assert found["target"] == "ollama" and found["rounds_activations"]
    assert found["differing_files"] == ([] if changed is None else [changed])


@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_ollama_prompts_with_the_tokens_of_training(kind: str, run: Path, tmp_path: Path) -> None:
    """What its template renders to, in llama.cpp's tokens: those that generation starts from."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    loaded = load_any(run)
    loaded.tokenizer.chat_template = "{{ bos_token }}" + DEFAULT_CHAT_TEMPLATE
    loaded.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    merge_for_export(loaded, "ollama", False, Events())
    folder = tmp_path / "ollama"
    export_ollama(loaded, folder, kind=kind, separator="\n", unquantised="F32")
    modelfile = (folder / "Modelfile").read_text(encoding="utf-8")
    template = modelfile.split('TEMPLATE """')[1].split('"""')[0]
    system = {"role": "system", "content": "red is a colour"}
    messages = [system, {"role": "user", "content": "green lamp"}]
    if kind == "prompt":
        text = render_go(template, {"Prompt": "green lamp"})
        ours = encode_prompt("prompt", "green lamp", loaded.tokenizer, "\n")
    else:
        text = render_chat(template, messages)
        ours = encode_prompt("messages", {"messages": messages}, loaded.tokenizer, "\n")
    engine = llama_cpp.Llama(str(folder / "model.gguf"), vocab_only=True, verbose=False)
    theirs = engine.tokenize(text.encode(), add_bos=True, special=True)
    engine.close()
    assert theirs == ours and ours[0] == 0 and 0 not in ours[1:]
