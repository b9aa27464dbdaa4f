"""ONNX Runtime GenAI and OpenVINO GenAI open an exported folder and answer as graft does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import graft
from graft.data.chat import DEFAULT_CHAT_TEMPLATE
from graft.export.onnx.write import export_onnx
from graft.export.openvino import tokenizers
from graft.export.openvino.write import export_openvino
from graft.export.probe import PROBE
from graft.model.load import LoadedModel, load_model

MODELS = [
    ("llama3-rope", None),
    ("llama3-rope", 4),
    ("mistral-window", 4),
    ("tied-qwen2", None),
    ("qwen3", 4),
    ("gemma", None),
]
PROMPTS = ("red lamp", "the table of the chair and a green light", "a")
MESSAGES = [{"role": "user", "content": "red\nlamp"}]
NEW = 24


@pytest.fixture
def genai() -> Any:
    pytest.importorskip("onnx", reason="needs onnx: make test-peers installs it")
    return pytest.importorskip(
        "onnxruntime_genai", reason="needs onnxruntime-genai: make test-peers installs it"
    )


@pytest.fixture
def openvino_genai() -> Any:
    pytest.importorskip(
        "openvino_tokenizers", reason="needs openvino-tokenizers: make test-peers installs it"
    )
    return pytest.importorskip(
        "openvino_genai", reason="needs openvino-genai: make test-peers installs it"
    )


@pytest.fixture
def chatting(tiny_loaded: Callable[..., LoadedModel]) -> Callable[..., LoadedModel]:
    """Return a function to a model that has rows for all tokens, and chats."""

    def make(name: str, bits: int | None, begins: bool = False) -> LoadedModel:
        loaded = tiny_loaded(name, bits, vocab_size=336)
        loaded.tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
        loaded.model.generation_config.eos_token_id = [7, 0]
        if begins:
            loaded.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<|end|> $A", special_tokens=[("<|end|>", 0)]
            )
        return loaded

    return make


def greedy(loaded: LoadedModel, ids: list[int]) -> list[int]:
    made = loaded.model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
    return made[0, len(ids) :].tolist()


def before_the_end(ids: list[int]) -> list[int]:
    """Up to a token that ends an answer, which the program leaves out."""
    return list(takewhile(lambda one: one not in (7, 0), ids))


def ids_of(loaded: LoadedModel, text: str) -> list[int]:
    ids: list[int] = loaded.tokenizer(text)["input_ids"]
    return ids


def rendered(loaded: LoadedModel) -> str:
    text = loaded.tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize(("name", "bits"), MODELS)
def test_onnxruntime_genai(
    name: str,
    bits: int | None,
    genai: Any,
    chatting: Callable[..., LoadedModel],
    tmp_path: Path,
) -> None:
    loaded = chatting(name, bits)
    assert export_onnx(loaded, tmp_path / "out") == ()
    model = genai.Model(str(tmp_path / "out"))
    tokenizer = genai.Tokenizer(model)
    for prompt in PROMPTS:
        ids = ids_of(loaded, prompt)
        assert [int(one) for one in tokenizer.encode(prompt)] == ids
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=len(ids) + NEW)
        generator = genai.Generator(model, options)
        generator.append_tokens(np.array(ids, np.int32))
        theirs = torch.from_numpy(np.array(generator.get_output("logits")))[0]
        with torch.no_grad():
            ours = loaded.model(torch.tensor([ids])).logits[0][-len(theirs) :]
        assert (theirs - ours).abs().max() <= 2e-5 * ours.abs().max()
        while not generator.is_done():
            generator.generate_next_token()
        found = [int(one) for one in generator.get_sequence(0)][len(ids) :]
        assert found == before_the_end(greedy(loaded, ids))
    together = genai.GeneratorParams(model)
    together.set_search_options(max_length=20, batch_size=2)
    generator = genai.Generator(model, together)
    generator.append_tokens(tokenizer.encode_batch(PROMPTS[:2]))  # the first is padded
    while not generator.is_done():
        generator.generate_next_token()
    width = len(ids_of(loaded, PROMPTS[1]))
    for row, prompt in enumerate(PROMPTS[:2]):
        found = [int(one) for one in generator.get_sequence(row)][width:]
        answer = greedy(loaded, ids_of(loaded, prompt))[: 20 - width]
        assert before_the_end(found) == before_the_end(answer)
    text = tokenizer.apply_chat_template(
        '[{"role": "user", "content": "red\\nlamp"}]', add_generation_prompt=True
    )
    assert text == rendered(loaded)
    assert list(tokenizer.eos_token_ids) == [7, 0]


@pytest.mark.parametrize("ends", [False, True])
def test_onnxruntime_genai_cuts_text_as_the_tokenizer_does(
    ends: bool, genai: Any, chatting: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """It puts the end token behind a text where that is the begin token too, which is told."""
    loaded = chatting("llama3-rope", None, begins=True)
    if not ends:
        loaded.tokenizer.eos_token = "~"
    told = export_onnx(loaded, tmp_path / "out")
    tokenizer = genai.Tokenizer(genai.Model(str(tmp_path / "out")))
    behind = [0] if ends else []
    assert len(told) == len(behind)
    for text in PROBE:
        ours = ids_of(loaded, text)
        assert [int(one) for one in tokenizer.encode(text)] == ours[1:]
        tokenizer.update_options(add_special_tokens="true")  # as the card says
        assert [int(one) for one in tokenizer.encode(text)] == [*ours, *behind]
        tokenizer.update_options(add_special_tokens="false")


@pytest.mark.parametrize(("name", "bits"), MODELS)
def test_openvino_genai(
    name: str,
    bits: int | None,
    openvino_genai: Any,
    chatting: Callable[..., LoadedModel],
    tmp_path: Path,
) -> None:
    """One prompt, prompts of different lengths together, and beams."""
    import openvino

    loaded = chatting(name, bits, begins=name == "qwen3")
    told = export_openvino(loaded, tmp_path / "out").notes
    assert len(told) == 1 and "INFERENCE_PRECISION_HINT" in told[0]
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    program = openvino_genai.LLMPipeline(str(tmp_path / "out"), "CPU", **settings)
    plain = {"max_new_tokens": NEW, "do_sample": False, "apply_chat_template": False}
    answers = []
    for prompt in PROMPTS:
        ids = ids_of(loaded, prompt)
        found = program.generate(openvino.Tensor(np.array([ids], np.int64)), **plain).tokens[0]
        ours = greedy(loaded, ids)
        assert found == ours
        answers.append(loaded.tokenizer.decode(ours, skip_special_tokens=True))
    assert program.generate(list(PROMPTS), **plain).texts == answers
    tokenizer = program.get_tokenizer()
    assert tokenizer.apply_chat_template(MESSAGES, True) == rendered(loaded)
    assert tokenizer.get_eos_token_id() == loaded.tokenizer.eos_token_id
    ids = torch.tensor([ids_of(loaded, PROMPTS[1])])
    beams = loaded.model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False)
    found = program.generate(
        openvino.Tensor(ids.numpy()), max_new_tokens=8, num_beams=3, apply_chat_template=False
    )
    assert found.tokens[0] == beams[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_a_16_bit_base_stays_as_large(
    target: str, dtype: str, tiny_base: Path, tmp_path: Path, readers: Any
) -> None:
    """Its weights are those of the source, and computed with in float32."""
    runtime = {"onnx": "onnxruntime", "openvino": "openvino"}[target]
    for package in (target, runtime):
        pytest.importorskip(package, reason=f"needs {package}: make test-peers installs it")
    base = tmp_path / "base"
    model = load_model(str(tiny_base), dtype="float32").model.to(getattr(torch, dtype))
    model.save_pretrained(base)
    for file in tiny_base.glob("*token*"):
        (base / file.name).write_bytes(file.read_bytes())
    graft.export_model(base, target, tmp_path / "out")
    data = {"onnx": "model.onnx.data", "openvino": "openvino_model.bin"}[target]
    size = (tmp_path / "out" / data).stat().st_size
    assert size <= 1.1 * (base / "model.safetensors").stat().st_size
    found = readers.read_weights(target, tmp_path / "out", model.config)
    for name in ("model.embed_tokens", "model.layers.1.mlp.down_proj"):
        assert torch.equal(found[name], model.get_parameter(f"{name}.weight").float())
    from graft.export.registry import TARGETS

    ids = list(range(40))
    theirs = TARGETS[target].start(tmp_path / "out", 40).logits(ids)
    with torch.no_grad():
        ours = load_model(str(base), dtype="float32").model(torch.tensor([ids])).logits[0]
    assert (theirs - ours).abs().max() <= 2e-5 * ours.abs().max()


def test_a_tokenizer_is_written_the_same_every_time(
    openvino_genai: Any, chatting: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """OpenVINO's running numbers, the machine and its programs leave no trace."""
    loaded = chatting("qwen2", None)
    for name in ("one", "two"):
        export_openvino(loaded, tmp_path / name)
    files = sorted((tmp_path / "one").glob("openvino_*"))
    assert len(files) == 6
    for file in files:
        content = file.read_bytes()
        assert content == (tmp_path / "two" / file.name).read_bytes()
        for trace in (str(tmp_path), "transformers_version", "OpenVINO Runtime"):
            assert trace.encode() not in content


def test_a_tokenizer_that_openvino_cuts_otherwise_is_left_out(
    openvino_genai: Any,
    chatting: Callable[..., LoadedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode = tokenizers.OpenVinoTokenizer.encode
    monkeypatch.setattr(
        tokenizers.OpenVinoTokenizer, "encode", lambda self, text: encode(self, text)[1:]
    )
    told = export_openvino(chatting("qwen2", None), tmp_path / "out").notes
    assert "gives other tokens for" in told[1]
    assert not (tmp_path / "out" / tokenizers.TOKENIZER).exists()


def test_without_openvino_tokenizers_it_is_said_how_to_get_them(
    chatting: Callable[..., LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="needs openvino: make test-peers installs it")
    monkeypatch.setattr(tokenizers, "PACKAGE", "openvino_tokenizers_of_nobody")
    loaded = chatting("llama3-rope", None)
    loaded.model.generation_config.eos_token_id = loaded.tokenizer.eos_token = None
    told = export_openvino(loaded, tmp_path / "out").notes
    assert "no token ends an answer" in told[2]
    assert "has no openvino_tokenizer.xml" in told[1] and "pip install" in told[1]
