"""Answers are found by position: in every family of templates, in long rows, whatever they say."""

from __future__ import annotations

import time

import pytest
from chat_families import ALL, CHATML, GEMMA, LLAMA3, MISTRAL, PHI, QWEN2, QWEN3, THINKING
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.data import chat
from graft.data.conversations import turns
from graft.data.shapes.messages import MESSAGES
from graft.errors import GraftError


def talk(*pairs: tuple[str, str], **more) -> list[dict]:
    """Return what a user and the assistant say in turn."""
    messages = []
    for asked, said in pairs:
        messages += [{"role": "user", "content": asked}]
        messages += [{"role": "assistant", "content": said, **more}]
    return messages


def render(messages, tokenizer, **more):
    return MESSAGES.render({"messages": messages, **more}, tokenizer, "")


def trained(found) -> list[str]:
    return [found.text[start:end] for start, end in found.spans]


def check_prompts(messages, tokenizer, found, **more) -> None:
    """Each trained answer stands right behind what generation is asked at its place.

    So do the places that no token straddles.
    """
    places = sorted({place for span in found.spans for place in span} | set(found.seams))
    asked = {}
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index:
            before = {"messages": messages[:index], **more}
            opening = MESSAGES.opening(before, tokenizer, "")
            asked[len(opening.text)] = opening
    for start, _ in found.spans:
        opening = asked[start]
        assert found.text.startswith(opening.text)
        assert list(opening.seams) == [place for place in places if place < start]


ENDS = {"qwen2": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}


@pytest.mark.parametrize("name", [*ALL, None])
def test_prompts_of_every_family_are_the_row_s_beginnings(build_tokenizer, name) -> None:
    tokenizer = build_tokenizer(chat_template=ALL[name] if name else None)
    for count in (1, 2, 3, 12):
        messages = talk(*[(f" question {n}\n", "abcdefghijkl"[n]) for n in range(count)])
        found = render(messages, tokenizer)
        assert len(found.spans) == count
        check_prompts(messages, tokenizer, found)
        shown = [text.removeprefix("<think>\n\n</think>\n\n").strip() for text in trained(found)]
        assert [text[0] for text in shown] == list("abcdefghijkl"[:count])
        end = ENDS.get(name or "", "")
        assert all(text.endswith(end) for text in trained(found))


@pytest.mark.parametrize("template", [CHATML, QWEN3, QWEN2, MISTRAL, GEMMA, LLAMA3, PHI])
def test_answers_of_one_letter_pass_like_any_other(build_tokenizer, template) -> None:
    tokenizer = build_tokenizer(chat_template=template)
    longer = trained(render(talk(("Pick.", "ZQ"), ("And now?", "ZQ")), tokenizer))
    for said in ("B", "d", "e", "i", "k", "t", "n", "<", "|", ">", "im", "think"):
        found = render(talk(("Pick.", said), ("And now?", said)), tokenizer)
        assert trained(found) == [text.replace("ZQ", said) for text in longer]


def test_thoughts_before_the_last_answer_alone_are_told(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template=QWEN3)
    found = render(talk(("a", "b"), ("c", "d")), tokenizer)
    assert trained(found) == ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]
    (remark,) = found.remarks
    assert remark.startswith("an answer before the last is trained without what the chat template")
    assert render(talk(("a", "b")), tokenizer).remarks == ()
    within = talk(("a", "<think>\nwhy\n</think>\n\nb"), ("c", "<think>\nso\n</think>\n\nd"))
    assert trained(render(within, tokenizer)) == [
        "b<|im_end|>",
        "<think>\nso\n</think>\n\nd<|im_end|>",
    ]


def test_an_answer_after_another_prompt_is_not_trained_and_told(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template=THINKING)
    found = render(talk(("a", "b"), ("c", "d")), tokenizer)
    assert trained(found) == ["</think>d<end>"]
    assert found.text == "<U>a<A>b<end><U>c<A><think>\n</think>d<end>"
    (remark,) = found.remarks
    assert remark.startswith("an answer is not trained, because the chat template renders what")
    # The prompt at that place is the row's beginning all the same.
    check_prompts(talk(("a", "b"), ("c", "d")), tokenizer, found)


def test_behind_a_last_answer_that_is_not_trained_nothing_is(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template=QWEN3)
    found = render(talk(("q", "first")) + talk(("", "second"))[1:], tokenizer)
    assert trained(found) == ["first<|im_end|>"]
    assert found.text.endswith("first<|im_end|>")
    assert any(remark.startswith("an answer is not trained") for remark in found.remarks)


def test_a_prompt_may_have_an_answer_that_says_nothing(build_tokenizer) -> None:
    messages = talk(("q", ""), ("r", ""))[:3]
    found = MESSAGES.opening({"messages": messages}, build_tokenizer(chat_template=CHATML), "")
    assert "assistant\n<|im_end|>\n<|im_start|>user\nr" in found.text


def test_a_template_whose_only_answer_has_another_prompt_is_refused(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template=THINKING.replace("loop.last", "false"))
    with pytest.raises(GraftError, match="message 2: the chat template does not render the messag"):
        render(talk(("a", "b")), tokenizer)


def test_tools_that_move_with_the_question_are_told(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template=MISTRAL)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    found = render(talk(("a", "b"), ("c", "d")), tokenizer, tools=tools)
    assert trained(found) == [" d</s>"]
    assert len(found.remarks) == 1


def test_an_end_that_is_written_behind_the_last_message_alone(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template=PHI)
    found = render(talk(("a", "b"), ("c", "d")), tokenizer)
    assert trained(found) == ["b<|end|>", "d<|end|>\n</s>"]


RETURNS = CHATML.replace(
    "<|im_end|>\n", "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}"
)
EMPTIED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<A>\n<think>"
    "{{ m.thinking if loop.last else '' }}</think>{{ m.content }}<E>"
    "{% else %}<U>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A>{% endif %}"
)


@pytest.mark.parametrize("count", [2, 12])
def test_an_end_that_is_another_where_messages_follow_is_not_trained(
    build_tokenizer, count
) -> None:
    tokenizer = build_tokenizer(chat_template=RETURNS)
    messages = talk(*[("a", "<|"), ("c", "e")] * (count // 2))
    found = render(messages, tokenizer)
    assert trained(found) == ["<|", "e"] * (count // 2 - 1) + ["<|", "e<|return|>"]
    (remark,) = found.remarks
    assert remark.startswith("an answer before the last is trained without its end, because")
    check_prompts(messages, tokenizer, found)


@pytest.mark.parametrize("count", [2, 12])
def test_thoughts_that_are_emptied_where_messages_follow_are_told(build_tokenizer, count) -> None:
    tokenizer = build_tokenizer(chat_template=EMPTIED)
    messages = talk(*[("a", "d")] * count, thinking="</t> why")
    found = render(messages, tokenizer)
    short, whole = "\n<think></think>d<E>", "\n<think></t> why</think>d<E>"
    assert trained(found) == [short] * (count - 1) + [whole]
    assert [remark.split(",")[0][:40] for remark in found.remarks] == [
        "the chat template renders nothing of 'th",
        "an answer before the last is trained wit",
    ]
    check_prompts(messages, tokenizer, found)


def test_answers_that_follow_each_other(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template=CHATML)
    messages = [*talk(("a", "b")), {"role": "assistant", "content": "c", "weight": 0}]
    messages += talk(("d", "e")) + [{"role": "assistant", "content": "f"}]
    found = render(messages, tokenizer)
    assert trained(found) == ["b<|im_end|>", "e<|im_end|>", "f<|im_end|>"]
    check_prompts(messages, tokenizer, found)


def test_a_long_row_whose_answers_have_another_prompt_takes_linear_time(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template=THINKING)
    render(talk(("a", "b")), tokenizer)
    begin = time.perf_counter()
    found = render(talk(*[(f"ask {n}", f"say {n}") for n in range(2000)]), tokenizer)
    assert time.perf_counter() - begin < 4  # each answer for itself would take a minute
    assert trained(found) == ["</think>say 1999<end>"]


LONG = ["qwen2", "qwen3", "llama3", "mistral", "gemma", "phi", "parts", "chatml", None]


@pytest.mark.parametrize("name", LONG)
def test_long_rows_are_as_if_each_answer_were_rendered(build_tokenizer, name, monkeypatch) -> None:
    tokenizer = build_tokenizer(chat_template=ALL[name] if name else None)
    messages = talk(*[(f"ask {n % 7}", f" {n % 5} say ") for n in range(30)])
    messages[7]["weight"] = messages[40]["weight"] = 0
    found = render(messages, tokenizer)
    check_prompts(messages, tokenizer, found)
    monkeypatch.setattr(turns, "FEW_ANSWERS", 1000)
    monkeypatch.setattr(chat, "FEW_ANSWERS", 0)
    with chat_anew():
        assert render(messages, tokenizer) == found


def chat_anew():
    """Return a context in which the process that renders is forked anew."""
    from graft.data.templates import _end, rendering

    _end()
    return rendering()


def test_long_rows_with_calls(build_tokenizer, monkeypatch) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turn = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for name in ("qwen2", "qwen3", "llama3", None):
        tokenizer = build_tokenizer(chat_template=ALL[name] if name else None)
        found = render(turn * 8, tokenizer, tools=tools)
        assert len(found.spans) == 16
        check_prompts(turn * 8, tokenizer, found, tools=tools)


def test_a_content_like_a_mark_is_none(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template=CHATML)
    messages = talk(*[("gq00000zk", f"gq{n:05d}zk") for n in range(12)])
    found = render(messages, tokenizer)
    assert trained(found) == [f"gq{n:05d}zk<|im_end|>" for n in range(12)]
    check_prompts(messages, tokenizer, found)


def test_a_template_that_counts_is_asked_of_each_answer(build_tokenizer) -> None:
    template = CHATML.replace("m.content", "loop.index ~ '.' ~ m.content")
    tokenizer = build_tokenizer(chat_template=template)
    found = render(talk(*[("a", "b")] * 12), tokenizer)
    assert trained(found) == [f"{n}.b<|im_end|>" for n in range(2, 25, 2)]


@pytest.mark.parametrize("name", ["qwen3", None])
def test_many_turns_take_linear_time(build_tokenizer, name) -> None:
    tokenizer = build_tokenizer(chat_template=ALL[name] if name else None)
    render(talk(("a", "b")), tokenizer)

    def seconds(count: int) -> float:
        row = talk(*[(f"ask {n}", f"say {n}") for n in range(count)])
        begin = time.perf_counter()
        assert len(render(row, tokenizer).spans) == count
        return time.perf_counter() - begin

    short, long = (min(seconds(count) for _ in range(3)) for count in (100, 800))
    assert long < 24 * short  # eight times as long; quadratic time would be 64 times


TEXTS = st.text(st.sampled_from("ab \n</>think|im_end🙂漢"), max_size=8)
SAID = TEXTS.filter(str.strip)


@pytest.fixture(scope="module")
def tokenizers(build_tokenizer):
    names = ["chatml", "qwen2", "qwen3", "llama3", "mistral", "gemma", "phi", "deepseek", None]
    return {name: build_tokenizer(chat_template=ALL[name] if name else None) for name in names}


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    pairs=st.lists(st.tuples(TEXTS, SAID), min_size=1, max_size=4),
    name=st.sampled_from(["chatml", "qwen2", "qwen3", "llama3", "mistral", "gemma", "phi", None]),
    data=st.data(),
)
def test_prompts_are_beginnings_whatever_is_said(tokenizers, pairs, name, data) -> None:
    messages = talk(*pairs)
    for message in messages[1:-1:2]:
        message["weight"] = data.draw(st.integers(0, 1))
    try:
        found = render(messages, tokenizers[name])
    except GraftError as error:
        # Qwen 3 takes what stands before </think> out of an answer that others follow.
        assert "renders this answer differently" in str(error) and name == "qwen3"  # noqa: PT017
        assert any("</think>" in said for _, said in pairs)
        return
    check_prompts(messages, tokenizers[name], found)
    untold = [message for message in messages[1::2] if message.get("weight", 1)]
    assert len(found.spans) == len(untold)
