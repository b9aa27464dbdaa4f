"""A chosen chat template: it is trained with, kept with the run, and travels with its exports."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from resuming import Heard, again, settings
from transformers import AutoTokenizer

import graft
from graft.api.run.folder import load_any
from graft.data.chat import DEFAULT_CHAT_TEMPLATE
from graft.errors import GraftError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "talks.jsonl"
    rows = [
        [
            {"role": "user", "content": f"{n}?"},
            {"role": "assistant", "content": f"{n}.", "name": "x"},
        ]
        for n in range(8)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def named(tiny_base, tmp_path):
    """A base with two templates by name, of which none is the default."""
    base = tmp_path / "named"
    shutil.copytree(tiny_base, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"plain": CHATML.replace("<|im_end|>", "</>"), "chatml": CHATML}
    tokenizer.save_pretrained(base)
    assert isinstance(AutoTokenizer.from_pretrained(base).chat_template, dict)
    return base


def test_a_name_is_chosen_and_travels(named, talks, tmp_path) -> None:
    run = tmp_path / "run"
    config = settings(named, talks, run, steps=2, max_length=64, chat_template="chatml")
    graft.finetune(dataclasses.replace(config, export=("hf",)))
    assert load_any(run).tokenizer.chat_template == CHATML
    (exported,) = (run / "export").iterdir()
    assert AutoTokenizer.from_pretrained(exported).chat_template == CHATML
    graft.finetune(again(run, steps=4))
    assert load_any(run).tokenizer.chat_template == CHATML


def test_a_file_is_kept_though_it_changes(tiny_base, talks, tmp_path) -> None:
    file, run = tmp_path / "mine.jinja", tmp_path / "run"
    file.write_text(CHATML)
    config = settings(tiny_base, talks, run, steps=2, max_length=64, chat_template=str(file))
    graft.finetune(config)
    file.write_text("{{ raise_exception('another') }}")
    graft.finetune(dataclasses.replace(config, steps=4, resume=True))
    file.unlink()
    assert load_any(run).tokenizer.chat_template == CHATML
    assert graft.generate(run, [{"role": "user", "content": "1?"}], max_new_tokens=1) is not None


def test_a_template_must_be_chosen_among_several(named, talks, tmp_path) -> None:
    config = settings(named, talks, tmp_path / "run", max_length=64)
    with pytest.raises(
        GraftError, match=r"the chat template is one of several \(chatml, plain\)"
    ) as told:
        graft.finetune(config)
    assert str(told.value).count("one of several") == 1
    wrong = dataclasses.replace(config, chat_template="chatm")
    with pytest.raises(
        GraftError, match=r"--chat-template 'chatm': no file.*own are chatml, plain"
    ):
        graft.finetune(wrong)
    assert not (tmp_path / "run").exists()


def test_graft_s_own_template_lies_beside_a_base_that_is_kept(tiny_base, talks, tmp_path) -> None:
    run = tmp_path / "run"
    graft.finetune(settings(tiny_base, talks, run, steps=2, method="qalora", bits=4, group_size=32))
    assert AutoTokenizer.from_pretrained(run / "base").chat_template == DEFAULT_CHAT_TEMPLATE
    assert load_any(run).tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE


def test_remarks_are_told_before_training(tiny_base, talks, tmp_path) -> None:
    heard = Heard()
    graft.finetune(settings(tiny_base, talks, tmp_path / "run", steps=1, max_length=64), heard)
    told = "  in 8 rows the chat template renders nothing of 'name' of assistant messages"
    assert sum(note.splitlines().count(told) for note in heard.notes) == 1
