"""Messages as people's files have them: what is trained, what is read, and what is refused."""

from __future__ import annotations

import json

import pytest
from chat_families import CHATML, PARTS

from graft.data.config import DataConfig
from graft.data.encode import encode_rows
from graft.data.load import load_examples
from graft.data.rows import Row, Rows, read_rows
from graft.data.shapes.messages import MESSAGES
from graft.errors import GraftError


def user(text: str, **more) -> dict:
    return {"role": "user", "content": text, **more}


def answer(text: str | None, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def trained(messages: list[dict], tokenizer, **more) -> list[str]:
    """Return the texts of a row that are trained."""
    fields = {"messages": messages, **more}
    assert MESSAGES.problems(fields) == []
    rendered = MESSAGES.render(fields, tokenizer, "")
    return [rendered.text[start:end] for start, end in rendered.spans]


@pytest.fixture(scope="module")
def chatml(build_tokenizer):
    return build_tokenizer(chat_template=CHATML)


@pytest.mark.parametrize("key", ["weight", "loss", "train", "training"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, 1.0), (0, None)])
def test_an_answer_is_trained_as_its_key_says(chatml, key, no, yes) -> None:
    talk = [user("a"), answer("Brick.", **{key: no}), user("b"), answer("Plum.", **{key: yes})]
    assert trained(talk, chatml) == ["Plum.<|im_end|>"]
    talk = [user("a"), answer("Plum.", **{key: yes}), user("b"), answer("Brick.", **{key: no})]
    assert trained(talk, chatml) == ["Plum.<|im_end|>"]


def test_a_row_ends_with_its_last_trained_answer(chatml) -> None:
    talk = [user("a"), answer("Plum."), user("b"), answer("Brick.", weight=0), user("c")]
    rendered = MESSAGES.render({"messages": talk}, chatml, "")
    assert rendered.text.endswith("Plum.<|im_end|>")
    # Both ends of an answer that is not trained are places that no token straddles.
    talk = [user("a"), answer("Brick.", weight=0), user("b"), answer("Plum.")]
    rendered = MESSAGES.render({"messages": talk}, chatml, "")
    first, last = rendered.seams
    assert rendered.text[first:last] == "Brick.<|im_end|>"


def test_keys_that_decide_on_training_are_not_shown_to_the_template(build_tokenizer) -> None:
    template = CHATML.replace("m.content", "(m | tojson)")
    tokenizer = build_tokenizer(chat_template=template)
    (text,) = trained([user("a"), answer("b", weight=1, loss=True)], tokenizer)
    assert json.loads(text.removesuffix("<|im_end|>")) == {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([user("a"), answer("b", weight=0.5)], "message 2: 'weight' is 0.5; expected 0 or 1"),
        ([user("a"), answer("b", loss="no")], "message 2: 'loss' is 'no'; expected 0 or 1"),
        ([user("a"), answer("b", train=[1])], "message 2: 'train' is [1]; expected 0 or 1"),
        (
            [user("a"), answer("b", weight=1, train=False)],
            "message 2: its keys contradict each other (weight true, train false)",
        ),
        ([user("a"), answer("b", weight=0)], "no message of the assistant's is trained"),
        ([answer("a"), user("b")], "message 1: the assistant speaks first"),
        ([user("a"), answer(None)], "message 2: 'content' is null; expected a string"),
        ([user("a"), {"role": "assistant"}], "message 2: 'content' is missing (keys: role)"),
        ([user("a"), answer(" ")], "message 2: the assistant's content is empty"),
        ([user("a"), answer("", tool_calls=[])], "message 2: the assistant's content is empty"),
        ([user(None), answer("b")], "message 1: 'content' is null"),
        ([{"content": "a"}, answer("b")], "message 1: 'role' is missing (keys: content)"),
        ([user("a"), answer({"x": 1})], "message 2: 'content' is an object; expected a string"),
        ([user("a\ud800"), answer("b")], "message 1: 'content' holds half of a surrogate pair"),
        (
            [user([{"type": "image_url", "image_url": {"url": "x"}}]), answer("b")],
            "message 1: part 1 is of type 'image_url'; graft trains on parts of type 'text' alone",
        ),
        (
            [user([{"type": "text", "text": "a"}, {"type": "input_audio"}]), answer("b")],
            "message 1: part 2 is of type 'input_audio'",
        ),
        ([user([{"type": "text"}]), answer("b")], "message 1: part 1: 'text' is null"),
        ([user(["a"]), answer("b")], "message 1: part 1 is a string; expected an object"),
    ],
)
def test_what_is_wrong_is_told_with_the_message(messages, problem) -> None:
    (found,) = MESSAGES.problems({"messages": messages})
    assert found.startswith(problem)


def test_a_problem_names_row_and_message(write_lines) -> None:
    rows = [{"messages": [user("a"), answer("b", weight=2)]}] * 2
    path = write_lines("a.jsonl", *map(json.dumps, rows))
    with pytest.raises(GraftError, match=f"{path}:2: message 2: 'weight' is 2; expected 0 or 1"):
        read_rows(path)


def test_an_assistant_may_speak_first_untrained(chatml) -> None:
    talk = [answer("Welcome.", weight=0), user("a"), answer("b")]
    assert trained(talk, chatml) == ["b<|im_end|>"]


def test_a_weight_of_others_is_told_and_harmless(chatml) -> None:
    talk = [user("a", weight=1), answer("b", weight=1)]
    rendered = MESSAGES.render({"messages": talk}, chatml, "")
    assert rendered.remarks == (
        "'weight' of user messages has no effect, as only the assistant's messages are trained",
    )
    assert (
        MESSAGES.render({"messages": [user("a", weight=0), answer("b")]}, chatml, "").remarks == ()
    )


@pytest.mark.parametrize("template", [CHATML, PARTS, None], ids=["text", "parts", "default"])
def test_contents_in_parts_are_their_texts(build_tokenizer, template) -> None:
    tokenizer = build_tokenizer(chat_template=template)
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " you", "image": None}]
    in_parts = {"messages": [user(parts), answer([{"type": "text", "text": "Hello."}])]}
    as_text = {"messages": [user("Hi you"), answer("Hello.")]}
    rendered = MESSAGES.render(in_parts, tokenizer, "")
    assert rendered == MESSAGES.render(as_text, tokenizer, "")
    assert "Hi you" in rendered.text
    assert rendered.text[slice(*rendered.spans[0])].startswith("Hello.")
    prompt = MESSAGES.opening({"messages": in_parts["messages"][:1]}, tokenizer, "")
    assert rendered.text.startswith(prompt.text)


def test_keys_of_parts_that_nobody_reads_are_told(chatml) -> None:
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    rendered = MESSAGES.render({"messages": [user([part]), answer("b")]}, chatml, "")
    assert rendered.remarks == ("'cache_control' of parts of a content is not read",)


def test_remarks_are_counted_and_shown_with_the_summary(chatml, write_lines) -> None:
    rows = [{"messages": [user("a", name="Ann"), answer("b")]}] * 3
    rows += [{"messages": [user("a"), answer("b", refusal="no")]}]
    path = write_lines("a.jsonl", *map(json.dumps, rows))
    data = load_examples(path, chatml, DataConfig(data=path), 99)
    assert data.remarks == {
        "the chat template renders nothing of 'name' of user messages": 3,
        "the chat template renders nothing of 'refusal' of assistant messages": 1,
    }
    assert data.summary().splitlines()[1:] == [
        "  in 3 rows the chat template renders nothing of 'name' of user messages",
        "  in 1 row the chat template renders nothing of 'refusal' of assistant messages",
    ]


@pytest.mark.parametrize("key", ["reasoning_content", "name", "odd"])
@pytest.mark.parametrize("shown", [True, False])
def test_half_a_pair_of_surrogates_is_told_where_it_is_rendered(
    build_tokenizer, key, shown
) -> None:
    written = "{{ m.content }}" + f"{{{{ m.{key} }}}}" * shown
    tokenizer = build_tokenizer(chat_template=CHATML.replace("{{ m.content }}", written))
    rows = [Row("a:1", {"messages": [user("a"), answer("b", **{key: "\ud83d hm"})]})]
    options = {"max_length": 99, "eos": True, "separator": ""}
    if shown:
        with pytest.raises(GraftError, match=f"a:1: message 2: '{key}' holds half of a surrogate"):
            encode_rows(Rows("messages", rows, ()), tokenizer, **options)
    else:
        data = encode_rows(Rows("messages", rows, ()), tokenizer, **options)
        assert list(data.remarks.values()) == [1]


def test_half_a_pair_is_told_at_any_depth(build_tokenizer) -> None:
    template = CHATML.replace("m.content", "m.content ~ (m.x | default | tojson)")
    tokenizer = build_tokenizer(chat_template=template)
    deep = {"messages": [user("a"), answer("b", x={"y": [1, {"\udc00": "z"}]})]}
    with pytest.raises(GraftError, match=r"message 2: 'x': 'y' 2: the key '\\udc00' holds half"):
        MESSAGES.render(deep, tokenizer, "")


def test_the_last_trained_answer_is_continued() -> None:
    talk = [user("a"), answer("b"), user("c"), answer("d", weight=0)]
    asked = MESSAGES.continuation({"messages": talk, "tools": "[]"})
    assert asked == ({"messages": talk[:1], "tools": "[]"}, "a", "b")
