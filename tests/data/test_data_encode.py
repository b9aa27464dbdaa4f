"""Masks, token by token, against truths that know nothing of offset mappings."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from graft.data.encode import EncodedData, Example, encode_prompt, encode_rows, mask_preview
from graft.data.rows import Row, Rows
from graft.data.sources.files import read_records
from graft.errors import GraftError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' }}{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML
TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]


def encode(kind, fields, tokenizer, max_length=1000, eos=True, separator="\n") -> Example:
    rows = Rows(kind, [Row("data.jsonl:1", fields)], ())
    return encode_rows(
        rows, tokenizer, max_length=max_length, eos=eos, separator=separator
    ).examples[0]


def tokens_of(*parts: tuple[str, bool]) -> list[tuple[str, bool]]:
    """Spell parts as byte tokens; a part that is written <...> is one special token."""
    tokens = []
    for text, trained in parts:
        special = text.startswith("<") and text.endswith(">")
        for token in [text] if special else text.replace(" ", "Ġ").replace("\n", "Ċ"):
            tokens.append((token, trained))
    return tokens


BOS, EOS = ("<s>", False), ("</s>", True)


@pytest.mark.parametrize(
    ("kind", "fields", "parts"),
    [
        ("text", {"text": "a b"}, [BOS, ("a b", True), EOS]),
        (
            "prompt",
            {"prompt": "p q", "completion": "c\nd"},
            [BOS, ("p q\n", False), ("c\nd", True)],
        ),
        (
            "instruction",
            {"instruction": "do", "input": "it", "output": "done"},
            [
                BOS,
                ("### Instruction:\ndo\n\n### Input:\nit\n\n### Response:\n", False),
                ("done", True),
            ],
        ),
        (
            "messages",
            {"messages": TALK},
            [
                BOS,
                ("### user:\none\n\n### assistant:\n", False),
                ("first", True),
                EOS,
                ("\n\n### user:\ntwo\n\n### assistant:\n", False),
                ("second", True),
            ],
        ),
    ],
)
def test_every_token_of_every_kind(tokenizer, kind, fields, parts):
    example = encode(kind, fields, tokenizer)
    parts = parts if parts[-1] == EOS else [*parts, EOS]
    assert mask_preview(example, tokenizer) == tokens_of(*parts)
    assert example.trains_eos
    assert not example.cut


def test_without_eos(tokenizer):
    example = encode("prompt", {"prompt": "p", "completion": "c"}, tokenizer, eos=False)
    assert mask_preview(example, tokenizer) == tokens_of(BOS, ("p\n", False), ("c", True))
    assert not example.trains_eos


@pytest.mark.parametrize("writes_eos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_an_eos_that_the_tokenizer_writes_is_never_doubled(build_tokenizer, writes_eos, eos):
    tokenizer = build_tokenizer(writes_eos=writes_eos)
    example = encode("prompt", {"prompt": "p", "completion": "c"}, tokenizer, eos=eos)
    expected = tokens_of(BOS, ("p\n", False), ("c", True), *[EOS] * eos)
    assert mask_preview(example, tokenizer) == expected
    prompt = encode_prompt("prompt", {"prompt": "p"}, tokenizer, "\n")
    assert prompt == example.input_ids[:3]


def test_special_tokens_in_the_text_are_never_doubled(tokenizer):
    example = encode("text", {"text": "<s>ab</s>"}, tokenizer)
    assert mask_preview(example, tokenizer) == [BOS, ("a", True), ("b", True), EOS]
    # They are the user's own text, so --no-eos leaves them.
    assert encode("text", {"text": "<s>ab</s>"}, tokenizer, eos=False) == example
    assert encode_prompt("text", "<s>ab", tokenizer, "\n") == example.input_ids[:3]


def test_a_tokenizer_without_bos(build_tokenizer):
    tokenizer = build_tokenizer(bos=False)
    example = encode("text", {"text": "ab"}, tokenizer)
    assert mask_preview(example, tokenizer) == [("a", False), ("b", True), EOS]


def test_eos_that_is_also_bos_or_pad_is_trained_where_it_ends(build_tokenizer):
    tokenizer = build_tokenizer(eos="<s>", writes_eos=True)
    tokenizer.pad_token = "<s>"
    example = encode("prompt", {"prompt": "p", "completion": "c"}, tokenizer)
    expected = tokens_of(BOS, ("p\n", False), ("c", True), ("<s>", True))
    assert mask_preview(example, tokenizer) == expected


START, END, LINE = ("<|im_start|>", False), ("<|im_end|>", False), ("\n", False)
ANSWERED = ("<|im_end|>", True)
CHATML_PARTS = [
    START,
    ("user\none", False),
    END,
    LINE,
    START,
    ("assistant\n", False),
    ("first", True),
    ANSWERED,
    LINE,
    START,
    ("user\ntwo", False),
    END,
    LINE,
    START,
    ("assistant\n", False),
    ("second", True),
    ANSWERED,
]


@pytest.mark.parametrize(
    ("template", "eos_token", "eos", "before", "after"),
    [
        (CHATML, "<|im_end|>", True, [BOS], []),
        (CHATML, "</s>", True, [BOS], [EOS]),
        (CHATML, "</s>", False, [BOS], []),
        (WITH_BOS, "</s>", True, [BOS], [EOS]),
    ],
    ids=["template's eos", "eos appended", "no eos", "template's bos"],
)
def test_end_of_turn_and_end_of_sequence(build_tokenizer, template, eos_token, eos, before, after):
    tokenizer = build_tokenizer(
        eos=eos_token,
        more_special=[t for t in ("<|im_start|>", "<|im_end|>") if t != eos_token],
        chat_template=template,
    )
    example = encode("messages", {"messages": TALK}, tokenizer, eos=eos)
    assert mask_preview(example, tokenizer) == tokens_of(*before, *CHATML_PARTS, *after)
    prompt = encode_prompt("messages", {"messages": TALK[:1]}, tokenizer, "\n")
    assert prompt == example.input_ids[: len(prompt)]
    assert example.targets.index(True) == len(prompt)


def test_no_token_straddles_prompt_and_completion(build_tokenizer):
    tokenizer = build_tokenizer(merges=[("Ġ", "b"), ("Ġb", "l")])
    assert tokenizer.tokenize("a blb") == ["a", "Ġbl", "b"]  # the trap is set
    example = encode("prompt", {"prompt": "a ", "completion": "blb"}, tokenizer)
    assert mask_preview(example, tokenizer) == tokens_of(BOS, ("a ", False), ("blb", True), EOS)
    prompt = encode_prompt("prompt", "a ", tokenizer, "\n")
    assert example.input_ids[: len(prompt)] == prompt


def test_white_space_that_trimmed_offsets_hide_is_trained(build_tokenizer):
    tokenizer = build_tokenizer(trim_offsets=True)
    encoded = tokenizer("c  d\n", return_offsets_mapping=True)
    assert any(start == end for start, end in encoded["offset_mapping"][1:])  # the trap is set
    for prompt, completion in [("p  q ", "c  d \n\ne  \n"), ("p\n", "c  "), ("", "  c ")]:
        example = encode("prompt", {"prompt": prompt, "completion": completion}, tokenizer)
        expected = tokens_of(BOS, (prompt, False), (completion, True), EOS)
        assert mask_preview(example, tokenizer) == expected


def test_cuts(tokenizer):
    fields = {"prompt": "pq", "completion": "cde"}  # <s> p q \n c d e </s>
    whole = encode("prompt", fields, tokenizer)
    assert len(whole.input_ids) == 8
    assert encode("prompt", fields, tokenizer, max_length=8) == whole
    for length in (5, 6, 7):
        example = encode("prompt", fields, tokenizer, max_length=length)
        expected = Example(whole.input_ids[:length], whole.targets[:length], whole.where, cut=True)
        assert example == expected


def test_rows_without_a_target_are_all_told(tokenizer):
    rows = [
        Row("d:1", {"prompt": "a long prompt", "completion": "c"}),
        Row("d:2", {"prompt": "p", "completion": "c"}),
        Row("d:3", {"prompt": "pqr", "completion": "c"}),
    ]
    with pytest.raises(GraftError) as caught:
        encode_rows(Rows("prompt", rows, ()), tokenizer, max_length=5, eos=True, separator="\n")
    message = str(caught.value)
    assert "2 problems" in message
    for where in ("d:1", "d:3"):
        assert f"{where}: no trained token is left after the cut to 5 tokens; raise" in message


def test_a_row_of_one_token_has_nothing_to_predict(build_tokenizer):
    tokenizer = build_tokenizer(bos=False)
    with pytest.raises(GraftError, match=r"data.jsonl:1: 1 token\(s\), none of which is trained"):
        encode("text", {"text": "a"}, tokenizer, eos=False)


def test_rows_that_the_template_refuses_are_told_with_the_rest(build_tokenizer):
    template = (
        "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    )
    tokenizer = build_tokenizer(chat_template=template)
    bad = [{"role": "user", "content": "bad"}, TALK[1]]
    long = [{"role": "user", "content": "x" * 50}, TALK[1]]
    rows = [
        Row(f"d:{number}", {"messages": messages})
        for number, messages in enumerate([TALK[:2], bad, long], start=1)
    ]
    with pytest.raises(GraftError) as caught:
        encode_rows(Rows("messages", rows, ()), tokenizer, max_length=40, eos=True, separator="")
    message = str(caught.value)
    assert "d:2: the chat template refuses the messages: no" in message
    assert "d:3: no trained token is left" in message
    assert "d:1" not in message


def test_tokenizers_that_cannot_be_used(tokenizer, build_tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(GraftError, match="the tokenizer is a slow one"):
        encode("text", {"text": "a"}, Slow())
    endless = build_tokenizer(eos=None)
    with pytest.raises(GraftError, match="names no end-of-sequence token.*pass --no-eos"):
        encode("text", {"text": "ab"}, endless)
    example = encode("text", {"text": "ab"}, endless, eos=False)
    assert example.targets == [False, True, True]


def test_counts_and_summary():
    examples = [
        Example([1, 2, 3], [False, True, True], "d:1", trains_eos=True),
        Example([1] * 2000, [False] + [True] * 1999, "d:2", cut=True),
    ]
    data = EncodedData(examples, "prompt", ("id", "label"))
    counts = (data.cut_rows, data.eos_rows, data.target_tokens, data.total_tokens)
    assert counts == (1, 1, 2001, 2003)
    assert data.summary() == (
        "2 prompt rows, 2,003 tokens, 2,001 of them trained (100%); 1 rows cut; "
        "end of sequence trained in 1 rows; keys not used: id, label"
    )
    assert replace(data, examples=examples[:1]).target_tokens == 2


def test_order_survives_chunks(tokenizer, monkeypatch):
    monkeypatch.setattr("graft.data.encode._CHUNK", 3)
    rows = [Row(f"d:{number}", {"text": f"row {number}"}) for number in range(10)]
    data = encode_rows(Rows("text", rows, ()), tokenizer, max_length=99, eos=True, separator="")
    for number, example in enumerate(data.examples):
        assert example.where == f"d:{number}"
        assert tokenizer.decode(example.input_ids) == f"<s>row {number}</s>"


SPECIALS = {"<s>", "</s>"}
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=30)
PIECES = st.sampled_from(["blue", " blue", "ok", " ", "  ", "\n\n", "é", "漢", "x"])
WORDS = st.lists(PIECES, max_size=5).map("".join)


@pytest.fixture(scope="module")
def merging(build_tokenizer):
    """Tokenizers with longer tokens, by whether their offsets hide white space."""
    merges = [("Ġ", "b"), ("Ġb", "l"), ("Ġbl", "u"), ("Ġblu", "e"), ("o", "k"), ("Ċ", "Ċ")]
    return {trim: build_tokenizer(merges=merges, trim_offsets=trim) for trim in (False, True)}


@settings(max_examples=400)
@given(
    prompt=st.one_of(WORDS, TEXTS),
    completion=st.one_of(WORDS, WORDS, TEXTS).filter(str.strip),
    max_length=st.integers(2, 40),
    eos=st.booleans(),
    trim_offsets=st.booleans(),
)
def test_masks_and_cuts_hold_for_any_text(
    merging, prompt, completion, max_length, eos, trim_offsets
):
    tokenizer = merging[trim_offsets]
    fields = {"prompt": prompt, "completion": completion}
    whole = encode("prompt", fields, tokenizer, eos=eos, max_length=10_000)
    lead = prompt + "\n" * bool(prompt and not prompt[-1].isspace())
    # A byte-level token is spelled with one character per byte, so its place in the text
    # follows from the lengths of the spellings alone.
    first, last, place = len(lead.encode()), len((lead + completion).encode()), 0
    spellings = tokenizer.convert_ids_to_tokens(whole.input_ids)
    for spelling, target in zip(spellings, whole.targets, strict=True):
        if spelling in SPECIALS:
            assert target == (spelling == "</s>")
            continue
        assert target == (place < last and place + len(spelling) > first)
        place += len(spelling)
    assert place == last
    assert spellings.count("</s>") == eos

    try:
        part = encode("prompt", fields, tokenizer, eos=eos, max_length=max_length)
    except GraftError as error:
        assert "no trained token is left after the cut" in str(error)
        assert not any(whole.targets[:max_length])
    else:
        assert part.input_ids == whole.input_ids[:max_length]
        assert part.targets == whole.targets[:max_length]
        assert part.cut == (len(whole.input_ids) > max_length)
        assert part.trains_eos == (eos and not part.cut)


@pytest.mark.parametrize("name", ["babyllama-361-1m", "mixed-13m", "stories260k"])
def test_real_tokenizers_train_the_completion_and_its_end(shared_models, shared_data, name):
    tokenizer = AutoTokenizer.from_pretrained(shared_models / name)
    records = list(read_records(shared_data / "e2e_nlg" / "test.jsonl.gz"))[::300]
    for record in records:
        example = encode("prompt", record.value, tokenizer)
        trained = [
            i for i, target in zip(example.input_ids, example.targets, strict=True) if target
        ]
        assert trained[-1] == tokenizer.eos_token_id
        assert trained.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(trained[:-1]).strip() == record.value["completion"]
        prompt = encode_prompt("prompt", record.value, tokenizer, "\n")
        assert example.input_ids[: len(prompt)] == prompt
        assert example.targets.index(True) == len(prompt)
