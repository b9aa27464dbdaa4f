"""Large files: several processes, and the cache, give the very examples of the plain loop."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from graft.data.config import DataConfig
from graft.data.encode import encode_rows
from graft.data.rows import read_rows
from graft.data.storage import bulk
from graft.data.storage.bulk import encoded_file
from graft.data.storage.store import Stored
from graft.errors import GraftError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' }}{% endif %}"
)
PROMPTS = [{"prompt": f"say {n}", "completion": f"{n} " * (n % 7 + 1)} for n in range(60)]
TEXTS = [{"text": f"line {n} " * (n % 9 + 1)} for n in range(60)]
TALKS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]}
    for n in range(60)
]


class Told:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stages: list[tuple[str, int, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        self.stages.append((stage, done, total))


@pytest.fixture(autouse=True)
def _all_is_large(monkeypatch):
    """Take a file of a few rows for a large one, in lots of seven, and two cores."""
    monkeypatch.setattr(bulk, "FEW_ROWS", 10)
    monkeypatch.setattr(bulk, "_SMALL_FILE", 0)
    monkeypatch.setattr(bulk, "_LOT_ROWS", 7)
    monkeypatch.setattr(bulk, "cores", lambda: 2)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))

    def write(rows: list[object], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def plain(path, tokenizer, max_length=24):
    return encode_rows(read_rows(path), tokenizer, max_length=max_length, eos=True, separator="\n")


def encoded(path, tokenizer, told=None, max_length=24, **options):
    return encoded_file(path, tokenizer, DataConfig(data=path, **options), max_length, told)


def whole(data):
    return [(*vars(one).values(),) for one in data.examples]


@pytest.mark.parametrize("rows", [PROMPTS, TEXTS, TALKS], ids=["prompt", "text", "messages"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_processes_give_what_one_gives(write, build_tokenizer, monkeypatch, rows, count):
    monkeypatch.setattr(bulk, "cores", lambda: count)
    tokenizer = build_tokenizer(chat_template=CHATML)
    path = write(rows)
    told = Told()
    found = encoded(path, tokenizer, told, cache=False)
    expected = plain(path, tokenizer)
    assert isinstance(found.examples, Stored)
    assert whole(found) == whole(expected)
    assert (found.kind, found.ignored_keys) == (expected.kind, expected.ignored_keys)
    assert found.summary() == expected.summary()
    assert told.notes == []
    assert told.stages[-1] == ("encoding", 1, 1)
    assert [done for _, done, _ in told.stages] == sorted(
        done for _, done, _ in told.stages[:-1]
    ) + [1]


def test_what_is_known_of_rows_is_counted_in_all_processes(write, build_tokenizer):
    rows = [{"messages": [dict(row["messages"][0]), row["messages"][1]]} for row in TALKS]
    for row in rows[::3]:
        row["messages"][0]["name"] = "Ann"  # which the template does not render
    path = write(rows)
    tokenizer = build_tokenizer(chat_template=CHATML)
    expected = plain(path, tokenizer)
    assert list(expected.remarks.values()) == [20]
    for _ in ("encoded", "from the cache"):
        assert encoded(path, tokenizer).remarks == expected.remarks
        assert encoded(path, tokenizer).summary() == expected.summary()


def test_a_conversation_of_three_megabytes_is_encoded(write, build_tokenizer):
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "abc " * 750_000}]
    path = write([*TALKS[:20], {"messages": talk}])
    found = encoded(path, build_tokenizer(chat_template=CHATML), cache=False)
    assert found.lost_tokens > 2_900_000


def test_without_processes_the_rows_are_encoded_here(write, tokenizer, monkeypatch):
    def refuse() -> int:
        raise OSError("no more processes")

    path = write(PROMPTS)
    monkeypatch.setattr("graft.data.worker.os.fork", refuse)
    assert whole(encoded(path, tokenizer)) == whole(plain(path, tokenizer))


@pytest.mark.parametrize("deaths", ["first", "every"])
def test_what_a_process_that_died_had_is_encoded_all_the_same(
    write, tokenizer, monkeypatch, tmp_path, deaths
):
    owner = os.getpid()
    answer = bulk._Work._answer

    def die(work, request):
        assert os.getpid() != owner
        mark = tmp_path / "died"
        if deaths == "every" or not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return answer(work, request)

    monkeypatch.setattr(bulk._Work, "_answer", die)
    path = write(PROMPTS)
    assert whole(encoded(path, tokenizer)) == whole(plain(path, tokenizer))
    assert (tmp_path / "died").exists()


def test_bad_rows_among_many_are_told_as_ever(write, build_tokenizer):
    template = "{% if '13' in messages[0]['content'] %}{{ 1 / 0 }}{% endif %}" + CHATML
    tokenizer = build_tokenizer(chat_template=template)
    rows = [
        *TALKS[:30],
        {
            "messages": [
                *TALKS[30]["messages"][:1],
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": "13"},
            ]
        },
        *TALKS[31:],
    ]
    path = write(rows)
    with pytest.raises(GraftError) as expected:
        plain(path, tokenizer)
    with pytest.raises(GraftError) as found:
        encoded(path, tokenizer)
    assert f"{path}:14: the chat template fails" in str(found.value)
    assert str(found.value) == str(expected.value)


def test_a_row_whose_template_never_ends_is_named(write, build_tokenizer, monkeypatch):
    monkeypatch.setattr("graft.data.templates.TEMPLATE_SECONDS", 1)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = "{% if messages[0]['content'] == '33?' %}" + endless + "{% endif %}" + CHATML
    path = write(TALKS)
    with pytest.raises(GraftError, match="rows.jsonl:34: the chat template takes more than 1 s"):
        encoded(path, build_tokenizer(chat_template=template))


def test_problems_of_reading_come_before_those_of_encoding(write, tokenizer):
    path = write([*PROMPTS, {"prompt": "p", "completion": ""}, {"text": "t"}])
    with pytest.raises(GraftError) as expected:
        read_rows(path)
    with pytest.raises(GraftError) as found:
        encoded(path, tokenizer)
    assert str(found.value) == str(expected.value)


def test_a_row_too_long_for_a_process_is_encoded_here(write, tokenizer, monkeypatch):
    monkeypatch.setattr(bulk, "_LONGEST_SENT", 200)
    rows = [*TEXTS[:20], {"text": "long " * 100}, *TEXTS[20:]]
    path = write(rows)
    found = encoded(path, tokenizer)
    assert whole(found) == whole(plain(path, tokenizer))
    assert found.row_count == len(rows)


def test_values_of_rows_and_odd_names_are_kept(tokenizer, tmp_path, write):
    path = write(PROMPTS, "o dd ü\udcff.jsonl")
    assert whole(encoded(path, tokenizer)) == whole(plain(path, tokenizer))
    assert whole(encoded(path, tokenizer)) == whole(plain(path, tokenizer))


def test_few_rows_stay_in_memory_and_out_of_the_cache(write, tokenizer, tmp_path):
    path = write(PROMPTS[:10])
    assert isinstance(encoded(path, tokenizer).examples, list)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").glob("encoded/*"))


def test_no_process_is_left(write, tokenizer):
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before = children()
    encoded(write(PROMPTS), tokenizer, cache=False)
    assert children() == before
