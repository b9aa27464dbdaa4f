"""The folder for Ollama: what its Modelfile says, read back as Ollama reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

import graft
from graft.api.config import TrainConfig
from graft.api.export import check_exports
from graft.data.chat import DEFAULT_CHAT_TEMPLATE
from graft.data.render import render_prompt
from graft.errors import GraftError
from graft.export.ollama.chat_probe import conversation, render_chat
from graft.export.ollama.go_template import render_go
from graft.export.ollama.write import export_ollama, modelfile, ollama_prompt
from graft.formats.dense import DenseFormat
from graft.formats.int_group import IntGroupFormat
from graft.model.load import LoadedModel

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


@pytest.fixture
def make_loaded(make_llama, byte_level, wrap):
    def make(template=None, bos_first=False, generation=None, **options):
        if bos_first:
            byte_level.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 0)]
            )
        tokenizer = wrap(byte_level, chat_template=template, **options)
        model = make_llama(IntGroupFormat())
        if generation is not None:
            model.generation_config = GenerationConfig(**generation)
        return LoadedModel(model, tokenizer, Path("base"), torch.float32, torch.float32)

    return make


def written(loaded, parsed, kind="prompt", separator="\n"):
    prompt = ollama_prompt(loaded.tokenizer, loaded.model.config, kind, separator)
    return prompt, parsed(modelfile(loaded, prompt))


@pytest.mark.parametrize(
    ("kind", "separator", "template"),
    [
        ("text", "\n", "{{ .Prompt }}"),
        ("prompt", "\n", "{{ .Prompt }}\n"),
        ("prompt", ' {{"', '{{ .Prompt }} {{ "{{" }}"'),
        ("instruction", "\n", "### Instruction:\n{{ .Prompt }}\n\n### Response:\n"),
    ],
)
def test_a_prompt_is_dressed_as_in_training(kind, separator, template, make_loaded, parsed):
    loaded = make_loaded()
    prompt, instructions = written(loaded, parsed, kind, separator)
    values = dict(instructions)
    assert instructions[0] == ("from", "./model.gguf")
    assert values["template"] == prompt.template == template
    trained = render_prompt(kind, "name[x]", loaded.tokenizer, separator)
    assert render_go(values["template"], {"Prompt": "name[x]"}) == trained
    assert prompt.notes == ()


def test_a_chat_template_and_its_stops(make_loaded, parsed):
    ends = {"eos_token_id": [1, 0]}
    loaded = make_loaded(CHATML, generation=ends, extra_special_tokens=["<|im_end|>"])
    prompt, instructions = written(loaded, parsed, "messages")
    template = dict(instructions)["template"]
    messages = conversation("suau", ["be brief", "who?", "me", "why?"])
    expected = render_prompt("messages", {"messages": messages}, loaded.tokenizer, "")
    assert render_chat(template, messages) == expected
    stops = [value for name, value in instructions if name == "stop"]
    assert stops == ["</s>", "<s>", "<|im_end|>"]
    assert prompt.bos == "" and dict(instructions)["num_ctx"] == "64"


@pytest.mark.parametrize("bos_first", [True, False])
def test_bos_is_left_to_llama_cpp_where_it_writes_one(bos_first, make_loaded, parsed):
    loaded = make_loaded("{{ bos_token }}" + CHATML, bos_first)
    prompt, instructions = written(loaded, parsed, "messages")
    rendered = render_chat(dict(instructions)["template"], conversation("su", ["a", "b"]))
    start = "<|im_start|>system\na" if bos_first else "<s><|im_start|>system\na"
    assert rendered.startswith(start)
    text = modelfile(loaded, prompt)
    assert ("# The chat template begins with '<s>'; llama.cpp puts it there" in text) is bos_first


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05},
            {"temperature": "0.7", "top_p": "0.9", "top_k": "20", "min_p": "0.05"},
        ),
        (
            {"do_sample": False, "repetition_penalty": 1.1, "max_new_tokens": 99},
            {"temperature": "0", "repeat_penalty": "1.1", "num_predict": "99"},
        ),
    ],
)
def test_generation_defaults(generation, expected, make_loaded, parsed):
    _, instructions = written(make_loaded(generation=generation), parsed)
    found = {
        name: value for name, value in instructions if name not in ("from", "template", "stop")
    }
    assert found == {**expected, "num_ctx": "64"}


def test_a_long_context_is_left_to_ollama(make_llama, make_loaded, parsed):
    loaded = make_loaded()
    loaded.model.config.max_position_embeddings = 8192
    assert "num_ctx" not in dict(written(loaded, parsed)[1])


@pytest.mark.parametrize(("token", "kept"), [('a "b"', True), ('"""', False), ("x\u200b", False)])
def test_stops_that_need_quotes_and_stops_that_none_can_hold(token, kept, make_loaded, parsed):
    loaded = make_loaded(eos_token=token)
    if kept:
        stops = [value for name, value in written(loaded, parsed)[1] if name == "stop"]
        assert token in stops
    else:
        with pytest.raises(GraftError, match="a Modelfile cannot hold it"):
            written(loaded, parsed)


def test_the_folder(make_loaded, tmp_path):
    notes = export_ollama(
        make_loaded(), tmp_path / "cat", kind="prompt", separator="\n", unquantised="F32"
    )
    assert notes == ()
    names = sorted(file.name for file in (tmp_path / "cat").iterdir())
    assert names == ["Modelfile", "model.gguf"]


def test_what_ollama_cannot_say_is_told_before_training(make_loaded, tmp_path):
    dated = "{{ strftime_now('%d') }}" + CHATML
    loaded = make_loaded(dated)
    with pytest.raises(GraftError, match="today's date"):
        export_ollama(loaded, tmp_path / "m", kind="messages", separator="", unquantised="F32")
    assert list(tmp_path.iterdir()) == []
    config = TrainConfig(model="m", data="d", out="o", method="qalora", export=("ollama", "gguf"))
    plan = (config, loaded.model.config, [IntGroupFormat(4, 32)], loaded.tokenizer)
    check_exports(*plan, "prompt")
    with pytest.raises(GraftError, match=r"--export ollama: the chat template writes today's"):
        check_exports(*plan, "messages")
    loaded.model.config.hidden_act = "gelu"
    with pytest.raises(GraftError, match=r"2 problems[\s\S]*ollama: hidden_act[\s\S]*gguf: hidden"):
        check_exports(*plan, None)


def test_a_run_and_a_folder_choose_their_prompt(tiny_base, rows, tmp_path, parsed):
    run = tmp_path / "run"
    settings = {"method": "qalora", "steps": 1, "batch_size": 4, "export": ("ollama",)}
    graft.finetune(
        graft.TrainConfig(
            model=str(tiny_base), data=str(rows), separator=" => ", out=str(run), **settings
        )
    )
    found = dict(parsed((run / "export" / "ollama" / "Modelfile").read_text(encoding="utf-8")))
    assert found["template"] == "{{ .Prompt }} => " and found["stop"] == "<|end|>"
    merged = tmp_path / "merged"
    graft.merge(run, merged)
    for template, start in (
        (None, "{{ .Prompt }}"),
        (DEFAULT_CHAT_TEMPLATE, "{{ if .System }}###"),
    ):
        if template is not None:
            (merged / "chat_template.jinja").write_text(template, encoding="utf-8")
        out = tmp_path / f"out-{template is None}"
        graft.export_model(merged, "ollama", out)
        found = dict(parsed((out / "Modelfile").read_text(encoding="utf-8")))
        assert found["template"].startswith(start)


def test_a_run_on_messages_gets_the_template_that_it_was_trained_on(tiny_base, tmp_path, parsed):
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "lamp"}]
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps({"messages": turns}) + "\n") * 8, encoding="utf-8")
    run = tmp_path / "run"
    settings = {"method": "qalora", "steps": 1, "batch_size": 2, "export": ("ollama",)}
    graft.finetune(
        graft.TrainConfig(model=str(tiny_base), data=str(data), out=str(run), **settings)
    )
    text = (run / "export" / "ollama" / "Modelfile").read_text(encoding="utf-8")
    rendered = render_chat(dict(parsed(text))["template"], conversation("uau", ["a", "b", "c"]))
    expected = "### user:\na\n\n### assistant:\nb<|end|>\n\n### user:\nc\n\n### assistant:\n"
    assert rendered == expected


def test_dense_models_too(make_llama, make_loaded, tmp_path):
    loaded = make_loaded()
    loaded.model = make_llama(DenseFormat())
    export_ollama(loaded, tmp_path / "m", kind="text", separator="", unquantised="F16")
    assert (tmp_path / "m" / "model.gguf").stat().st_size > 0


def test_settings_that_are_no_numbers_write_no_line(make_loaded):
    loaded = make_loaded(generation={"do_sample": True})
    loaded.model.generation_config.temperature = '0.7\nSYSTEM "evil"'
    with pytest.raises(GraftError, match="temperature is .*expected a finite number"):
        modelfile(loaded, ollama_prompt(loaded.tokenizer, loaded.model.config, "text", ""))
