"""`graft data`: what would be trained on, in a terminal, without colours, as a page and as JSON."""

from __future__ import annotations

import html.parser
import json
import random
import shutil
from pathlib import Path

import pytest

from graft.api.data import histogram
from graft.cli.main import main
from graft.data.examples import Example
from graft.data.storage.store import facts_of
from graft.model.pieces import one_line, pieces_of, visible

NASTY = '<script>alert(1)</script> \x1b[31m & "quoted"\u202e'


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "red lamp", "completion": f"blue\tchair € {number}"} for number in range(8)]
    rows += [rows[2], {"prompt": NASTY, "completion": NASTY}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["data", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_row_is_shown_with_its_mask_where_there_are_no_colours(
    tiny_base: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, tiny_base, rows_file, "--row", 1)
    assert "\x1b" not in out
    lines = out.splitlines()
    (place,) = [number for number, line in enumerate(lines) if "rows.jsonl:1: " in line]
    row = "\n".join(lines[place + 1 :])
    assert row.replace("¦", "") == "red·lamp↵\n[blue⇥chair·€·0⟨<|end|>⟩]"
    assert row.count("[") == row.count("]") == 1
    assert "held out" not in lines[place] and "trained" in lines[place]
    text = " ".join(out.split())
    for expected in ("tokens that are trained", "rows cut", "end of sequence trained", "0 to"):
        assert expected in text
    assert "rows that are there before" in text and "--deduplicate" in text


def test_colours_are_for_terminals_that_have_them(
    tiny_base: Path, rows_file: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    painted = shown(capsys, tiny_base, rows_file, "--row", 1)
    assert "\x1b[" in painted and "[blue" not in painted and "on green" in painted
    with monkeypatch.context() as few:
        few.setenv("TERM", "xterm")
        few.delenv("COLORTERM", raising=False)
        assert "\x1b[30;42m" in shown(capsys, tiny_base, rows_file, "--row", 1), "green"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            plain = shown(capsys, tiny_base, rows_file, "--row", 1)
            assert "\x1b" not in plain and "⟨<|end|>⟩]" in plain


class Tags(html.parser.HTMLParser):
    """Which tags a page has, and what they refer to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [str(value) for name, value in attrs if name in ("src", "href")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_no_network_and_escapes_every_text(
    tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    out = shown(capsys, tiny_base, rows_file, "--rows", 20, "--html", page)
    assert out.endswith(f"page: {page}\n")
    text = page.read_text(encoding="utf-8")
    found = Tags(text)
    assert not found.tags & {"script", "link", "img", "iframe", "object", "base"}
    assert not found.references and "http" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text and "viewport" in text and "svg" in found.tags
    assert "<script>alert(1)" in found.text.replace("·", " ")
    assert "\x1b" not in text and "\u202e" not in text and r"\x1b" in text
    assert text.count('class="row"') == 9, "as many rows as are trained"
    assert "€" in text and 'class="t ' in text and "In numbers" in text


def test_everything_is_there_as_json(
    tiny_base: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(shown(capsys, tiny_base, rows_file, "--json", "--rows", 2))
    assert found["training"]["rows"] + found["held_out"]["rows"] == 10
    assert len(found["rows"]) == 2
    assert found["overlap"]["repeated"] + found["overlap"]["held_out_trained"] == 1
    assert sum(found["lengths"]["counts"]) == found["training"]["examples"]
    ids = [token for piece in found["rows"][0]["pieces"] for token in piece["ids"]]
    assert len(ids) > 5 and any(piece["trained"] for piece in found["rows"][0]["pieces"])


def test_rows_that_are_nearly_trained_are_named(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training, held_out = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    words = "table oak steel light heavy small chair green blue of and the is a large red".split()

    def line(number: int, last: str) -> str:
        mixed = random.Random(f"row {number}").choices(words, k=24)
        return json.dumps({"prompt": " ".join(mixed), "completion": last}) + "\n"

    training.write_text("".join(line(number, "lamp") for number in range(8)))
    held_out.write_text(line(3, "oak oak") + line(5, "lamp"))
    out = shown(capsys, tiny_base, training, "--eval-data", held_out)
    (note,) = [one for one in out.splitlines() if "nearly a training row" in one]
    assert note.startswith("note: 1 of 2 held-out rows are nearly a training row: ")
    assert note.endswith("% of test.jsonl:1 is in train.jsonl:4")


def test_a_folder_with_a_tokenizer_alone_is_enough(
    tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in tiny_base.glob("tokenizer*"):
        shutil.copy(file, folder)
    out = shown(capsys, folder, rows_file, "--max-length", 300)
    assert "rows.jsonl" in out and "at most 300 are kept" in out
    assert main(["data", str(tmp_path), str(rows_file)]) == 1
    assert "neither config.json nor tokenizer.json" in capsys.readouterr().err


def test_what_training_would_remark_is_said(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_base, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    )
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "red", "name": "Ann"}]
    messages += [{"role": "assistant", "content": "lamp"}]
    line = json.dumps({"messages": messages, "source": "x"}) + "\n"
    path.write_text(line * 4 + line.replace("lamp", "chair"))
    held_out = tmp_path / "test.jsonl"
    held_out.write_text(line * 4)
    out = shown(capsys, folder, path, "--deduplicate", "--eval-data", held_out, "--rows", 0)
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    told = ("in 5 rows", "held out: in 4 rows", "keys that are not used: source", "4 training rows")
    for expected in told:
        assert any(expected in note for note in notes), notes


def test_what_training_would_refuse_is_refused_with_all_problems(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": 1, "completion": "a"}\n{"prompt": "a", "completion": ""}\n')
    page = tmp_path / "page.html"
    assert main(["data", str(tiny_base), str(path), "--html", str(page)]) == 1
    told = capsys.readouterr().err
    assert "rows.jsonl:1" in told and "rows.jsonl:2" in told and not page.exists()


def test_a_row_that_is_not_there_is_told(
    tiny_base: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", str(tiny_base), str(rows_file), "--row", "99"]) == 1
    assert "--row 99: no row has that number" in capsys.readouterr().err
    assert "held out" in "".join(
        shown(capsys, tiny_base, rows_file, "--row", number) for number in range(1, 11)
    )


def test_tokens_have_the_text_that_they_stand_for(tiny_base: Path) -> None:
    from graft.model.folder import read_tokenizer

    tokenizer = read_tokenizer(tiny_base)
    text = " red  lamp 日\n€<|end|>"
    ids = tokenizer(text)["input_ids"]
    example = Example(ids, [False] * 3 + [True] * (len(ids) - 3), "x:1")
    pieces = pieces_of(example, tokenizer)
    assert "".join(piece.text for piece in pieces) == text
    assert [token for piece in pieces for token in piece.ids] == ids
    assert {piece.text for piece in pieces if len(piece.ids) > 1} == {"日", "€"}
    assert [piece.special for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    half = Example(ids[:-2], example.targets[:-2], "x:1")  # the last character is not whole
    assert "".join(piece.text for piece in pieces_of(half, tokenizer))[:-2] == text[:-8]
    line = one_line(pieces, most=10)
    assert line.startswith("·red") and "[" in line and line.endswith("end|>]") and "…" in line


def test_white_space_is_seen() -> None:
    assert visible("a b\n\tc\xa0\u200b\x1b") == r"a·b↵" + "\n" + r"⇥c\xa0\u200b\x1b"


@pytest.mark.parametrize("longest", [1, 7, 20, 512, 1024, 32768])
def test_every_length_is_in_a_bar(longest: int) -> None:
    lengths = [1, longest // 2 + 1, longest]
    facts = facts_of([Example([0] * n, [False] * n, "x:1") for n in lengths])
    found = histogram(facts)
    assert sum(found.counts) == 3 and len(found.counts) == len(found.bars) - 1 <= 22
    assert found.bars[-1] > longest


def test_what_was_read_otherwise_is_said_once(tiny_base: Path, rows_file: Path, capsys) -> None:
    with rows_file.open("a", encoding="utf-8") as file:
        file.write('{"prompt": 1}\n')
    out = shown(capsys, tiny_base, rows_file, "--rows", 0, "--skip-bad-rows")
    assert out.count("1 bad row is skipped") == 1


def test_a_folder_for_the_page_is_told_before_the_work(tiny_base, rows_file, tmp_path, capsys):
    assert main(["data", str(tiny_base), str(rows_file), "--html", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert not out and "is a folder; name a file, such as data.html" in err


def test_of_a_run_the_model_is_named(tiny_base, rows_file, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"model: {tiny_base}\ndata: d\nout: {run}\nmethod: lora\n")
    assert main(["data", str(run), str(rows_file)]) == 1
    assert f"is the folder of a run; give the model that it trained: graft data {tiny_base}" in (
        capsys.readouterr().err
    )
