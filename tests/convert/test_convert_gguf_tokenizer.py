"""The tokenizer in a GGUF file: made from it, and compared with one that is given."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from gguf import GGUFValueType as Value
from gguf import TokenType
from gguf_written import CONFIGS, Written, rewritten
from transformers import AutoTokenizer

import graft
from graft.convert.readers.gguf_source import gguf_source
from graft.errors import GraftError
from graft.model.gguf.file import read_gguf
from graft.model.gguf.tokenizer import make_tokenizer
from graft.model.gguf.tokens import TokenList, read_tokens
from graft.model.probe import probe_texts

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def exported(tiny_base, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    graft.export_model(tiny_base, "gguf", path)
    return path


@pytest.fixture
def changed(exported, tmp_path):
    def write(*add, drop=()):
        return rewritten(exported, tmp_path / "changed.gguf", add=add, drop=drop)

    return write


@pytest.fixture
def given(tiny_base, tmp_path):
    """Return a function that changes the contents of tokenizer.json in a copy of the base."""

    def copy(change):
        folder = tmp_path / "given"
        shutil.copytree(tiny_base, folder)
        spec = json.loads((folder / "tokenizer.json").read_text())
        change(spec)
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        return folder

    return copy


def test_without_a_folder_the_tokenizer_is_made_of_the_file(tiny_base, exported, tmp_path):
    report = graft.convert_model(exported, tmp_path / "out")
    assert "the tokenizer is made of what the file says of it" in report.notes
    _, found = graft.load(tmp_path / "out")
    expected = AutoTokenizer.from_pretrained(tiny_base)
    for text in [*probe_texts()[:200], "one<|end|>two"]:
        assert found(text)["input_ids"] == expected(text)["input_ids"], text
        assert found.decode(found(text)["input_ids"]) == text
    assert found.eos_token == found.bos_token == "<|end|>"


def test_the_same_tokenizer_is_said_to_be_the_same(tiny_base, exported, tmp_path):
    report = graft.convert_model(exported, tmp_path / "out", tokenizer=tiny_base)
    assert report.notes[1:] == (
        f"{len(probe_texts())} probe texts are cut into the same ids as by the file's tokenizer",
    )


def test_what_a_file_says_of_its_ends_and_template(changed, tmp_path):
    file = changed(
        ("tokenizer.ggml.add_bos_token", True, Value.BOOL),
        ("tokenizer.ggml.add_eos_token", True, Value.BOOL),
        ("tokenizer.ggml.eos_token_id", 5, Value.UINT32),
        ("tokenizer.chat_template", TEMPLATE, Value.STRING),
    )
    graft.convert_model(file, tmp_path / "out")
    model, tokenizer = graft.load(tmp_path / "out")
    first, *_, last = tokenizer("some words")["input_ids"]
    assert (first, last) == (0, 5) and model.config.eos_token_id == 5
    assert tokenizer.chat_template == TEMPLATE


def swapped(spec):
    vocabulary = spec["model"]["vocab"]
    one, two = "a", "b"
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]


def shifted(spec):
    """As where another special token was put before all others."""
    spec["model"]["vocab"] = {token: index + 1 for token, index in spec["model"]["vocab"].items()}
    for token in spec["added_tokens"]:
        token["id"] += 1


def other_merges(spec):
    merges = spec["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def in_words(spec):
    spec["pre_tokenizer"]["add_prefix_space"] = True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swapped, "2 problems"),
        (shifted, "316 other ids are other tokens too"),
        (other_merges, "which are not the same ("),
        (in_words, "probe texts are cut otherwise than by the file's tokenizer"),
    ],
)
def test_another_tokenizer_is_refused(change, words, exported, given, tmp_path):
    folder = given(change)
    with pytest.raises(GraftError, match=re.escape(words)) as caught:
        graft.convert_model(exported, tmp_path / "out", tokenizer=folder)
    assert "give the one of the same model, or leave it out" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_loaded_as_it_is_compares_too(exported, given):
    folder = given(swapped)
    with pytest.raises(GraftError, match=r"id \d+ is 'a' in the file and 'b' in the tokenizer"):
        graft.load(exported, tokenizer=str(folder))


def test_a_file_that_is_loaded_as_it_is_needs_no_folder(exported, tiny_base):
    _, found = graft.load(exported)
    expected = AutoTokenizer.from_pretrained(tiny_base)
    assert found("some words")["input_ids"] == expected("some words")["input_ids"]


def note_of(file, folder):
    return gguf_source(file).check_tokenizer(AutoTokenizer.from_pretrained(folder))


def test_tokens_that_only_one_side_has_are_told(exported, changed, given):
    def added(spec):
        pad = spec["added_tokens"][0] | {"id": 320, "content": "<pad>"}
        spec["added_tokens"].append(pad)

    folder = given(added)
    assert note_of(exported, folder)[:2] == [
        "1 tokens of the tokenizer lie beyond the 320 of the file: <pad>",
        "special tokens in only one of file and tokenizer: <pad>",
    ]
    spec = json.loads((folder / "tokenizer.json").read_text())
    del spec["added_tokens"][1]
    last = max(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    del spec["model"]["vocab"][last]
    spec["model"]["merges"] = spec["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    without = changed(("tokenizer.ggml.merges", merges, Value.ARRAY, Value.STRING))
    assert note_of(without, folder)[0].startswith("1 tokens of the file are not in the tokenizer:")


def test_padding_of_the_token_list_is_told(exported, changed, tiny_base, given):
    texts = read_tokens(read_gguf(exported)).texts
    types = [int(TokenType.NORMAL)] * len(texts)
    texts[0], types[0] = "[PAD0]", int(TokenType.UNUSED)
    file = changed(
        ("tokenizer.ggml.tokens", texts, Value.ARRAY, Value.STRING),
        ("tokenizer.ggml.token_type", types, Value.ARRAY, Value.INT32),
    )
    assert "1 ids that the file does not use are tokens: <|end|>" in note_of(file, tiny_base)


def test_other_settings_are_told(changed, tiny_base):
    file = changed(
        ("tokenizer.ggml.eos_token_id", 7, Value.UINT32),
        ("tokenizer.ggml.add_bos_token", True, Value.BOOL),
        ("tokenizer.chat_template", TEMPLATE, Value.STRING),
    )
    eos, template, around = note_of(file, tiny_base)
    assert eos == "EOS is 7 in the file and 0 in the tokenizer"
    assert template == "the chat template of the file is another; the tokenizer's is kept"
    assert re.fullmatch(r"around 'a' the file's tokenizer makes \[0, \d+\], the given .*", around)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tokenizer.ggml.pre", "of-tomorrow", "its pre-tokenizer is 'of-tomorrow', which graft"),
        ("tokenizer.ggml.model", "rwkv", "its tokenizer is 'rwkv'; graft makes one of gpt2"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_asked_for(
    key, value, words, changed, tiny_base, tmp_path
):
    file = changed((key, value, Value.STRING))
    with pytest.raises(GraftError, match=words):
        graft.convert_model(file, tmp_path / "out")
    report = graft.convert_model(file, tmp_path / "out", tokenizer=tiny_base)
    assert "how the file's tokenizer cuts text was not compared" in report.notes[-1]


def test_damaged_token_lists_are_refused(changed, tiny_base):
    short = changed(("tokenizer.ggml.token_type", [1, 1], Value.ARRAY, Value.INT32))
    with pytest.raises(GraftError, match="token_type has 2 entries for 320 tokens"):
        gguf_source(short)
    alike = ["a"] * 320
    file = changed(("tokenizer.ggml.tokens", alike, Value.ARRAY, Value.STRING))
    with pytest.raises(GraftError, match="two of its tokens are alike"):
        gguf_source(file).own_tokenizer()
    with pytest.raises(GraftError, match="the tokenizer is not that of"):
        note_of(file, tiny_base)


PIECES = ["▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "ca", "cab", "▁abc", "bb", "aa"]


def joined(text, scores):
    """SentencePiece's way: the neighbours of the highest score become one, the first of equals."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        found = [
            (scores[left + right], -at)
            for at, (left, right) in enumerate(zip(pieces, pieces[1:], strict=False))
            if left + right in scores
        ]
        if not found:
            return pieces
        at = -max(found)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def test_a_tokenizer_of_scored_pieces(tmp_path):
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + PIECES
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    kinds += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(PIECES)
    rng = np.random.default_rng(1)
    scores = [0.0] * 259 + [float(score) for score in -rng.permutation(len(PIECES))]
    tokens += [f"[PAD{index}]" for index in range(len(tokens), 320)]
    kinds += [TokenType.UNUSED] * (320 - len(kinds))
    scores += [-1000.0] * (320 - len(scores))

    def change(writer, _):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_types([int(kind) for kind in kinds])
        writer.add_token_scores(scores)

    file = Written(tmp_path / "m.gguf", CONFIGS["llama"], change=change).path
    found = make_tokenizer(read_tokens(read_gguf(file)), file)
    assert len(found) == 259 + len(PIECES)  # without what fills up the list
    known = dict(zip(PIECES, scores[259:], strict=False))
    ids = {token: index for index, token in enumerate(tokens)}
    for text in ["".join(rng.choice(list("abc "), 12)) for _ in range(300)]:
        assert found(text)["input_ids"] == [0, *(ids[piece] for piece in joined(text, known))]
    assert found("é</s>")["input_ids"] == [0, 259, ids["<0xC3>"], ids["<0xA9>"], 2]
    assert found.decode(found(" a b")["input_ids"], skip_special_tokens=True) == " a b"


def test_a_token_of_a_million_letters_is_no_piece():
    texts, kinds = ["<unk>", "a", "a" * 1_000_000], [TokenType.UNKNOWN] + [TokenType.NORMAL] * 2
    tokens = TokenList(
        "llama", "default", texts, kinds, [0.0] * 3, [], {"unk": 0}, False, False, True, None
    )
    with pytest.raises(GraftError, match=r"has 1,000,000 letters; expected at most 256"):
        make_tokenizer(tokens, "m.gguf")


def test_a_file_without_tokens_asks_for_the_folder(tmp_path):
    written = Written(tmp_path / "m.gguf", CONFIGS["llama"])
    with pytest.raises(GraftError, match="--tokenizer"):
        graft.convert_model(written.path, tmp_path / "out")
