"""What stands before an answer is, id by id, what generation starts from; on every family."""

from __future__ import annotations

import pytest
from families import FAMILIES, LOSSLESS, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.data.encode import encode_prompt, encode_rows
from graft.data.examples import Example
from graft.data.rows import Row, Rows
from graft.data.shapes.registry import SHAPES

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' }}{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = (None, CHATML, INST)

ROWS_AT_ONCE = 20
DRAWS = 92  # for each of the 11 families, so that 20,240 rows are tried


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param, build(request.param)


def pieces() -> st.SearchStrategy[str]:
    """Texts of what meets at a joint: white space, punctuation, digits, letters of any script."""
    odd = st.sampled_from(
        [
            *(" ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u200b", "\u3000"),
            *("x", "ab", "the", " the", "return", "    return x", "def f(x):", "12", "345", "6,7"),
            *(":", "'s", "...", "!=", "###", "é", "e\u0301", "\u0301", "ß", "漢", "字", "да", "ع"),
            *("हि", "न्दी", "👍", "👍🏽", "\u200d", "</think>", "[/INST]", "▁", "Ġ", "-", "_"),
        ]
    )
    words = st.lists(odd, max_size=4).map("".join)
    return words | st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=8)


@st.composite
def rows(draw: st.DrawFn) -> tuple[str, list[dict], str | None, str]:
    """Return a kind, rows of it, a chat template and a separator."""
    kind = draw(st.sampled_from(["prompt", "instruction", "messages", "text"]))
    asked, answer = pieces(), pieces().map(lambda text: text if text.strip() else text + "x")
    row = {
        "prompt": st.fixed_dictionaries({"prompt": asked, "completion": answer}),
        "instruction": st.fixed_dictionaries(
            {"instruction": answer, "input": asked, "output": answer}
        ),
        "text": st.fixed_dictionaries({"text": answer.map(lambda text: text + " y")}),
        "messages": st.lists(st.tuples(asked, answer), min_size=1, max_size=3).map(talk),
    }[kind]
    found = draw(st.lists(row, min_size=ROWS_AT_ONCE, max_size=ROWS_AT_ONCE))
    separator = draw(st.sampled_from(["\n", "", " ", "\n\n"]))
    return kind, found, draw(st.sampled_from(TEMPLATES)), separator


def talk(turns: list[tuple[str, str]]) -> dict:
    messages = []
    for asked, answer in turns:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def openings(kind: str, fields: dict) -> list[dict]:
    """Return what generation is given for each answer in a row."""
    if kind == "text":
        return []
    if kind != "messages":
        return [fields]
    messages = fields["messages"]
    return [{"messages": messages[:end]} for end in range(1, len(messages), 2)]


def beginnings(example: Example) -> list[int]:
    """Return where each run of trained tokens begins."""
    before = [False, *example.targets]
    return [place for place, target in enumerate(example.targets) if target and not before[place]]


@settings(max_examples=DRAWS, suppress_health_check=list(HealthCheck))
@given(drawn=rows())
def test_the_prompts_ids_are_a_prefix_of_the_rows(family, drawn):
    name, tokenizer = family
    kind, found, tokenizer.chat_template, separator = drawn
    given_rows = Rows(
        kind, [Row(f"d:{i}", SHAPES[kind].fields(row)) for i, row in enumerate(found)], ()
    )
    data = encode_rows(given_rows, tokenizer, max_length=10_000, eos=True, separator=separator)
    assert len(data.examples) == ROWS_AT_ONCE
    for row, example in zip(found, data.examples, strict=True):
        asked = [
            encode_prompt(kind, fields, tokenizer, separator) for fields in openings(kind, row)
        ]
        for ids in asked:
            assert example.input_ids[: len(ids)] == ids
        if kind != "text" and asked[0]:
            assert beginnings(example) == [len(ids) for ids in asked]
        text = SHAPES[kind].render(SHAPES[kind].fields(row), tokenizer, separator).text
        if name in LOSSLESS and (name != "llama2" or "<" not in text):
            ids = example.input_ids[1 if tokenizer.bos_token else 0 :]
            spelt = tokenizer.decode(ids, skip_special_tokens=False)
            # SentencePiece writes a space as ▁; Mistral adds none before one that begins a text.
            assert _plain(spelt, name) == _plain(text, name)


def _plain(text: str, family: str) -> str:
    text = text.removesuffix("</s>").replace("▁", " ")
    return text.lstrip(" ") if family == "mistral" else text
