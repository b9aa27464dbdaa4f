"""The text of a model card: front matter that parses, and Markdown that no name can break."""

from __future__ import annotations

import ast
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from graft.export.card import CardFacts, front_matter, license_of, model_card
from graft.export.registry import TARGETS
from graft.text import markdown, printable

NASTY = "a|b <script>*c*</script> [d](e) `f` ```g``` # h\n\n# 'i' \"j\" $x$ &lt;"


def parts(text: str) -> tuple[dict, str]:
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.mark.parametrize("target", list(TARGETS))
def test_front_matter_and_a_way_to_run_it(target: str) -> None:
    facts = CardFacts(
        target,
        "model",
        "A title",
        base_model="owner/name",
        license={"license": "apache-2.0"},
        tags=("qalora",),
        tables={"Data": {"rows": "40"}, "Nothing": {}},
        notes=("worth telling",),
    )
    front, body = parts(model_card(facts))
    library = {"hf": "transformers", "ollama": "gguf"}.get(target, target)
    assert front == {
        "base_model": "owner/name",
        "license": "apache-2.0",
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["graft", "qalora"],
    }
    assert body.startswith("\n# A title\n\nLicence: apache-2.0.\n\n## Data\n\n| | |\n|---|---|\n")
    assert "| rows | 40 |" in body and "Nothing" not in body
    assert body.endswith("\n## Notes\n\n- worth telling\n")
    ((language, commands),) = re.findall(r"^```(\w*)\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
    if language == "python":
        ast.parse(commands)
    assert target != "peft" or 'from_pretrained("owner/name")' in commands


def test_what_is_not_known_is_left_out() -> None:
    front, body = parts(model_card(CardFacts("hf", "model", "A title")))
    assert set(front) == {"library_name", "pipeline_tag", "tags"}
    assert "The licence is not stated here" in body
    assert re.findall("^## .*", body, re.MULTILINE) == ["## How to run it"]


def test_no_name_breaks_the_page() -> None:
    """One title, one row of two cells, one block of commands: whatever the names are."""
    facts = CardFacts(
        "gguf",
        "it's `````.gguf",
        NASTY,
        base_model=NASTY,
        license={"license": "other", "license_name": NASTY},
        tags=(NASTY,),
        tables={NASTY: {NASTY: NASTY}},
        notes=(NASTY,),
    )
    text = model_card(facts)
    front, body = parts(text)
    assert front["base_model"] == front["license_name"] == front["tags"][1] == NASTY
    headings = re.findall("^#+ .*", body, re.MULTILINE)
    assert len(headings) == 4 and "<script>" not in body.replace(r"\<script\>", "")
    row = next(line for line in body.splitlines() if line.startswith("| a"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    fences = re.findall(r"^(`{3,})$", body, re.MULTILINE)
    assert fences == ["`" * 6] * 2
    command = body.split("`" * 6)[1].strip()
    program = shlex.split(command)[-1]
    ast.parse(program)
    assert "it's `````.gguf" in program


@pytest.mark.parametrize(
    "text",
    [
        NASTY,
        "\x1b]0;t\x07 \u202e end",
        "- a",
        "+ a",
        "1. a",
        "2) a",
        "> a",
        "=== a",
        "    code",
        "~~~ python",
        "<http://a.b> http://a.b www.a.b <b@c.d> b@c.d",
        "![a](http://b/c.png) [x]: http://b",
        "a\\nb \\",
        "&amp; &#35;",
        "***bold*** __x__ ~~y~~",
        "| a | b |\n|---|---|\n| c | d |",
        "a\n===\nb\n---\nc",
    ],
)
def test_markdown_shows_a_text_as_it_is(text: str) -> None:
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown(text))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    inside = [(child.type, child.content) for child in tokens[1].children or []]
    assert {kind for kind, _ in inside} <= {"text", "text_special"}
    assert "".join(content for _, content in inside) == " ".join(printable(text).split())
    assert not re.search(r"(?<!\\)://|www\.", markdown(text))  # which GitHub would link


def test_text_is_one_line() -> None:
    assert markdown("a\n b\t|c") == r"a b \|c"
    assert markdown("plain, text-1.0 (x)") == "plain, text-1.0 (x)"


def test_where_a_card_lies() -> None:
    assert TARGETS["gguf"].card_path(Path("out/m.gguf")) == Path("out/m.gguf.md")
    assert TARGETS["mlx"].card_path(Path("out/m")) == Path("out/m/README.md")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# T", {"license": "mit"}),
        (
            "---\r\nlicense: other\r\nlicense_name: own\r\nlicense_link: L\r\n---\r\n",
            {"license": "other", "license_name": "own", "license_link": "L"},
        ),
        ("---\nlicense: [mit, other]\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("# T\n---\nlicense: mit\n---\n", {}),
        ("---\n- license\n---\n", {}),
    ],
)
def test_the_licence_that_a_card_names(text: str, expected: dict, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_bytes(text.encode())
    assert license_of(card) == expected


def test_no_card_names_nothing(tmp_path: Path) -> None:
    assert front_matter(tmp_path / "README.md") == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert front_matter(tmp_path / "README.md") == {}


def test_a_card_that_is_no_file_or_a_bomb_names_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.md")
    assert front_matter(tmp_path / "pipe.md") == {}
    anchors = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\na0: &a0 1\n{anchors}---\n")
    assert front_matter(tmp_path / "README.md") == {}
    (tmp_path / "README.md").write_text("---\n" + "license: mit\n" * 2**17 + "---\n")
    assert front_matter(tmp_path / "README.md") == {}


def test_a_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    facts = CardFacts("hf", "model", "T", license={"license": "other", "license_name": NASTY})
    (tmp_path / "README.md").write_text(model_card(facts), encoding="utf-8")
    assert license_of(tmp_path / "README.md") == facts.license
