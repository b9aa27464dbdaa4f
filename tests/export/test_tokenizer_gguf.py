from __future__ import annotations

import gguf
import pytest
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig

from graft.errors import GraftError
from graft.export.gguf.tokenizer import add_tokenizer_metadata, convert_tokenizer
from graft.export.gguf.tokenizer_kind import TokenizerKind
from graft.export.gguf.write import check_gguf
from graft.formats.int_group import IntGroupFormat
from graft.model.gguf.pre_tokenizers import PRE_TOKENIZERS

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def config(size=320, **changes):
    return LlamaConfig(vocab_size=size, **({"bos_token_id": 0, "eos_token_id": 1} | changes))


def split_by(regex):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def test_byte_level(byte_level, wrap):
    byte_level.add_tokens([AddedToken("<tool>", special=False)])
    found = convert_tokenizer(wrap(byte_level, chat_template="{{ x }}"), config())
    size = byte_level.get_vocab_size()
    assert found.kind.model == "gpt2" and found.kind.pre == "gpt-2"
    assert len(found.tokens) == len(found.types) == 320 and len(set(found.tokens)) == 320
    for index in range(size):
        assert found.tokens[index] == byte_level.id_to_token(index)
    assert found.tokens[size] == f"[PAD{size}]"
    assert found.types[:2] == (TokenType.CONTROL, TokenType.CONTROL)
    assert found.types[size - 1] is TokenType.USER_DEFINED
    assert set(found.types[2 : size - 1]) == {TokenType.NORMAL}
    assert set(found.types[size:]) == {TokenType.UNUSED}
    made = {merge.replace(" ", "") for merge in found.merges}
    assert made and made <= set(found.tokens)
    assert found.scores == () and found.notes == ()
    assert found.special_ids == {"bos": 0, "eos": 1}
    assert not found.add_bos and not found.add_eos
    assert found.chat_template == "{{ x }}"


def test_sentencepiece(sentencepiece, wrap):
    found = convert_tokenizer(wrap(sentencepiece, unk_token="<unk>"), config(290))
    assert found.kind.model == "llama" and found.kind.add_space_prefix
    ids = {token: index for index, token in enumerate(found.tokens)}
    assert found.types[:3] == (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL)
    assert set(found.types[3:259]) == {TokenType.BYTE}
    assert found.types[ids["he"]] is found.types[ids["a"]] is TokenType.NORMAL
    # "he" is made by merge 0, "▁t" by 1, "▁the" by 2 ("▁t" + "he"), "at" by 3 ...
    scores = [found.scores[ids[token]] for token in ("he", "▁t", "▁the", "at", "the")]
    assert scores == [0.0, -1.0, -2.0, -4.0, -5.0]
    assert found.scores[ids["a"]] < min(scores)
    assert found.merges == () and found.add_bos and not found.add_eos
    assert found.special_ids == {"bos": 1, "eos": 2, "unk": 0}


def test_keys_that_are_written(sentencepiece, wrap, tmp_path):
    templates = {"default": "{{ a }}", "tool_use": "{{ b }}"}
    tokenizer = wrap(sentencepiece, unk_token="<unk>", chat_template=templates)
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    add_tokenizer_metadata(writer, convert_tokenizer(tokenizer, config(290)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "vocabulary.gguf").fields
    found = {name: field.contents() for name, field in fields.items()}
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.tokens"][1:4] == ["<s>", "</s>", "<0x00>"]
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert len(found["tokenizer.ggml.scores"]) == 290
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    ids = [found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown")]
    assert ids == [1, 2, 0]
    assert found["tokenizer.chat_template"] == "{{ a }}"
    assert found["tokenizer.chat_template.tool_use"] == "{{ b }}"


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (split_by(LLAMA3), "llama-bpe"),
        (split_by(QWEN2), "qwen2"),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
            "smollm",
        ),
    ],
)
def test_pre_tokenizers_by_regex(pre_tokenizer, name, byte_level, wrap):
    byte_level.pre_tokenizer = pre_tokenizer
    assert convert_tokenizer(wrap(byte_level), config()).kind.pre == name


def test_unknown_regex_is_named(byte_level, wrap):
    byte_level.pre_tokenizer = split_by(r"\w+|\s+")
    with pytest.raises(GraftError, match=r"\\w\+\|\\s\+.*not one of llama.cpp's.*'gpt-2'"):
        convert_tokenizer(wrap(byte_level), config())


@pytest.mark.parametrize("name", [row.name for row in PRE_TOKENIZERS])
def test_every_pre_tokenizer_of_llama_cpp_is_found_by_what_it_cuts(name, byte_level, wrap):
    """Not by how it is spelt: an expression between parentheses is another text."""
    (row,) = [row for row in PRE_TOKENIZERS if row.name == name]
    splits = [
        pre_tokenizers.Split(Regex(f"(?:{split})"), "isolated")
        for split in row.published or row.splits
    ]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_level.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
    ignores = row.ignores_merges
    vocabulary = byte_level.get_vocab(with_added_tokens=False) | {"q": 50, "qqq": 310}
    byte_level.model = models.BPE(vocabulary, [("h", "e")], ignore_merges=ignores)
    found = convert_tokenizer(wrap(byte_level), config())
    assert found.kind.pre == name
    assert bool(row.published) == any("cuts rare texts otherwise" in note for note in found.notes)


CAMEL = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+SHORT|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*SHORT|"
    r"NUMBER| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = CAMEL.replace("SHORT", "").replace("NUMBER", r"\p{N}")
O200K = CAMEL.replace("SHORT", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("NUMBER", r"\p{N}{1,3}")


@pytest.mark.parametrize(("regex", "name"), [(TEKKEN, "tekken"), (O200K, "gpt-4o")])
def test_what_llama_cpp_only_comes_near_to_is_told(regex, name, byte_level, wrap):
    byte_level.pre_tokenizer = split_by(regex)
    found = convert_tokenizer(wrap(byte_level), config())
    assert found.kind.pre == name
    (note,) = found.notes
    assert "letters beyond ASCII in upper case" in note and "llama.cpp into [" in note


def test_an_expression_that_differs_in_one_place_is_refused(byte_level, wrap):
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: index for index, letter in enumerate(["<s>", "</s>", *sorted(letters)])}
    merges = [("1", "2"), ("12", "3"), ("Ċ", "/"), ("Ġ", "Ġ")]
    vocabulary |= {left + right: 300 + index for index, (left, right) in enumerate(merges)}
    for spelt, other in ((r"{1,3}", r"{1,2}"), (r"\r\n]*", r"\r\n/]*"), (r"(?!\S)", r"(?!\w)")):
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = split_by(LLAMA3.replace(spelt, other))
        tokenizer.add_special_tokens(["<s>", "</s>"])
        with pytest.raises(GraftError, match="'llama-bpe', the nearest|'dbrx', the nearest"):
            convert_tokenizer(wrap(tokenizer), config())


def test_gemmas_split_at_spaces_finds_none(sentencepiece, wrap):
    sentencepiece.normalizer = normalizers.Replace(" ", "▁")
    sentencepiece.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    found = convert_tokenizer(wrap(sentencepiece, unk_token="<unk>"), config(290))
    assert found.kind == TokenizerKind("llama", "default")
    sentencepiece.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_previous")
    with pytest.raises(GraftError, match="are not SentencePiece's"):
        convert_tokenizer(wrap(sentencepiece, unk_token="<unk>"), config(290))


def test_tokens_that_merges_do_not_reach(byte_level, wrap):
    vocabulary = byte_level.get_vocab() | {"xyzzy": 310}
    merges = [tuple(merge) for merge in (("t", "h"),)]
    vocabulary["th"] = 311
    for ignore_merges, refused in ((True, True), (False, False)):
        plain = {t: i for t, i in vocabulary.items() if len(t) == 1 or t in ("xyzzy", "th")}
        tokenizer = Tokenizer(models.BPE(plain, merges, ignore_merges=ignore_merges))
        tokenizer.pre_tokenizer = byte_level.pre_tokenizer
        tokenizer.add_special_tokens(["<s>", "</s>"])
        if refused:
            with pytest.raises(GraftError, match="ignore_merges is True.*'xyzzy'"):
                convert_tokenizer(wrap(tokenizer), config())
        else:
            assert convert_tokenizer(wrap(tokenizer), config()).kind.pre == "gpt-2"


def test_other_models_are_refused(wrap):
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<s>"))
    with pytest.raises(GraftError, match="its model is WordLevel"):
        convert_tokenizer(wrap(words), config())
    plain = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2}, []))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(GraftError, match="neither byte-level .*Whitespace"):
        convert_tokenizer(wrap(plain), config())


def test_prefix_space_and_normalizer_are_refused_together(byte_level, wrap):
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    byte_level.normalizer = normalizers.Lowercase()
    with pytest.raises(GraftError, match=r"2 problems[\s\S]*Lowercase[\s\S]*add_prefix_space"):
        convert_tokenizer(wrap(byte_level), config())


def test_nfc_and_greedy_tokens_are_noted(byte_level, wrap):
    byte_level.normalizer = normalizers.NFC()
    byte_level.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    notes = convert_tokenizer(wrap(byte_level), config()).notes
    assert len(notes) == 2 and "NFC" in notes[0] and "<mask>" in notes[1]


def test_metaspace(sentencepiece, wrap):
    sentencepiece.normalizer = None
    for scheme, prefix, noted in (("always", True, 1), ("first", True, 1), ("never", False, 0)):
        sentencepiece.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
        kind = convert_tokenizer(wrap(sentencepiece, unk_token="<unk>"), config(290)).kind
        assert kind.add_space_prefix is prefix and len(kind.notes) == noted


def test_sentencepiece_without_its_bytes_or_with_other_normalizers(sentencepiece, wrap):
    sentencepiece.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.NFKC(), normalizers.Replace(" ", "▁")]
    )
    with pytest.raises(GraftError, match="NFKC"):
        convert_tokenizer(wrap(sentencepiece), config(290))


def test_merges_that_no_scores_reproduce(wrap):
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc"]
    pieces += ["ab", "bc", "abc"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocabulary, [("a", "b"), ("b", "c"), ("a", "bc")], byte_fallback=True)
    )  # ("ab", "c") is no merge, but SentencePiece would join them
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.add_special_tokens(["<s>", "</s>"])
    with pytest.raises(GraftError, match="do not follow from scores.*'abc'"):
        convert_tokenizer(wrap(backend), config())


def test_a_word_that_sentencepieces_merges_do_not_reach(sentencepiece, wrap):
    vocabulary = sentencepiece.get_vocab(with_added_tokens=False) | {"xyz": 289}
    sentencepiece.model = models.BPE(vocabulary, [], byte_fallback=True, ignore_merges=True)
    with pytest.raises(GraftError, match="ignore_merges is True.*tokens are cut differently"):
        convert_tokenizer(wrap(sentencepiece, unk_token="<unk>"), config(290))


def test_what_stands_around_a_text(byte_level, wrap):
    both = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    byte_level.post_processor = both
    found = convert_tokenizer(wrap(byte_level), config())
    assert found.add_bos and found.add_eos
    byte_level.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    with pytest.raises(GraftError, match=r"puts the ids \[1\] before a text.*BOS \(id 0\)"):
        convert_tokenizer(wrap(byte_level), config())


def test_special_ids_fall_back_to_the_model(byte_level, wrap):
    tokenizer = wrap(byte_level, bos_token=None, eos_token=None)
    found = convert_tokenizer(tokenizer, config(eos_token_id=[1, 5], pad_token_id=7))
    assert found.special_ids == {"bos": 0, "eos": 1, "pad": 7}


def test_a_tokenizer_larger_than_the_model(make_llama, byte_level, wrap):
    model = make_llama(IntGroupFormat(), vocab_size=64)
    (problem,) = check_gguf(model, wrap(byte_level))
    assert "beyond the model's 64 embeddings" in problem and "'<s>'" not in problem


def test_an_added_token_beyond_the_embeddings_is_left_out(byte_level, wrap, tmp_path):
    size = byte_level.get_vocab_size()
    byte_level.add_special_tokens(["<pad>"])
    found = convert_tokenizer(wrap(byte_level, pad_token="<pad>"), config(size, pad_token_id=size))
    assert "<pad>" not in found.tokens and len(found.tokens) == size
    assert found.special_ids == {"bos": 0, "eos": 1}
    (note,) = found.notes
    assert f"'<pad>' are left out, because they lie beyond the model's {size} embeddings" in note
    for used in ({"eos_token": "<pad>"}, {"chat_template": "{{ x }}<pad>"}):
        with pytest.raises(GraftError, match="1 tokens .'<pad>' ....*texts or prompts hold them"):
            convert_tokenizer(wrap(byte_level, **used), config(size))


def test_an_embedding_without_a_token_gets_a_name_of_its_own(byte_level, wrap):
    last = byte_level.get_vocab_size() + 1
    byte_level.add_tokens([f"[PAD{last}]"])
    found = convert_tokenizer(wrap(byte_level), config(last + 1))
    assert found.tokens[last - 1 :] == (f"[PAD{last}]", f"[[PAD{last}]]")


def test_a_tokenizer_that_names_no_end_is_told(byte_level, wrap):
    found = convert_tokenizer(wrap(byte_level, eos_token=None), config(eos_token_id=None))
    (note,) = found.notes
    assert "eos" not in found.special_ids and "name eos_token" in note


def test_a_name_that_llama_cpp_takes_for_phi3(byte_level, wrap):
    plain = convert_tokenizer(wrap(byte_level), config())
    names = {"phi3-like": "Phi_3-like", "My-Phi-3.5": "My-Phi_3.5", "Llama": "Llama"}
    assert {name: plain.named(name) for name in names} == names
    kept = ["<unk>", "<s>", "<|endoftext|>"]
    byte_level.add_special_tokens(kept)
    byte_level.add_special_tokens(
        [AddedToken("</s>", rstrip=True), AddedToken("<|end|>", rstrip=True)]
    )
    stripping = convert_tokenizer(wrap(byte_level), config(330))
    assert stripping.named("assistant") == "Phi-3 assistant" and stripping.notes == ()
    assert stripping.named("phi3-tuned") == "phi3-tuned"


def falcon_steps(**digits):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(**{"individual_digits": False} | digits),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )


def test_falcon(byte_level, wrap):
    byte_level.pre_tokenizer = falcon_steps()
    with pytest.raises(GraftError, match=r"cuts ' 12' into \[' ', '12'\]"):
        convert_tokenizer(wrap(byte_level), config())  # its merges are those of GPT-2's words
    byte_level.model = models.BPE(byte_level.get_vocab(with_added_tokens=False), [("h", "e")])
    assert convert_tokenizer(wrap(byte_level), config()).kind.pre == "falcon"
    byte_level.pre_tokenizer = falcon_steps(individual_digits=True)
    assert convert_tokenizer(wrap(byte_level), config()).kind.pre == "falcon"  # no token has two
