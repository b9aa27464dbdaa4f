"""llama.cpp cuts text as graft's table of its pre-tokenizers says, and as real tokenizers do."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, PreTrainedTokenizerFast

from graft.export.gguf.tokenizer import add_tokenizer_metadata, convert_tokenizer
from graft.model.gguf.pre_tokenizers import PRE_TOKENIZERS
from graft.model.probe import probe_texts

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="needs llama-cpp-python: make test-peers installs it"
)
LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PIECE = 10


class Vocabulary:
    """The tokenizer of a GGUF file that need not hold anything else."""

    def __init__(self, path: Path) -> None:
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)

    def ids(self, text: str, special: bool = True) -> list[int]:
        encoded = text.encode()
        room = len(encoded) + 8
        found = (ctypes.c_int32 * room)()
        count = llama_cpp.llama_tokenize(
            self.vocabulary, encoded, len(encoded), found, room, False, special
        )
        assert count >= 0
        return list(found[:count])


@contextmanager
def opened(path: Path) -> Iterator[Vocabulary]:
    found = Vocabulary(path)
    try:
        yield found
    finally:
        llama_cpp.llama_model_free(found.model)


@pytest.fixture(scope="module")
def every_piece(tmp_path_factory):
    """A file by whose tokenizer every word of the probe is one token; its tokens, and texts."""
    whole = probe_texts()
    texts = [text[at : at + PIECE] for text in whole for at in range(0, len(text), PIECE - 1)]
    spelt = {word for text in texts for word, _ in LETTERS.pre_tokenize_str(text)}
    tokens = dict.fromkeys([*sorted(LETTERS.alphabet()), "<s>"])
    merges: dict[str, None] = {}
    for text in spelt:
        for size in range(2, len(text) + 1):
            for start in range(len(text) - size + 1):
                word = text[start : start + size]
                tokens[word] = None
                merges |= {f"{word[:cut]} {word[cut:]}": None for cut in range(1, size)}
    path = tmp_path_factory.mktemp("words") / "gpt-2.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(tokens))
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(list(tokens).index("<s>"))
    writer.add_eos_token_id(list(tokens).index("<s>"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path, list(tokens), texts


@pytest.mark.parametrize("row", PRE_TOKENIZERS, ids=lambda row: row.name)
def test_the_table_is_what_llama_cpp_computes(row, every_piece, tmp_path):
    path, tokens, texts = every_piece
    key = b"tokenizer.ggml.pre\x08\x00\x00\x00"
    before, _, after = path.read_bytes().partition(key)
    name = row.name.encode()
    other = tmp_path / "other.gguf"
    other.write_bytes(before + key + len(name).to_bytes(8, "little") + name + after[8 + 5 :])
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in row.splits]
    steps = pre_tokenizers.Sequence([*splits, LETTERS])
    with opened(other) as vocabulary:
        for text in texts:
            words = [tokens[index] for index in vocabulary.ids(text)]
            assert words == [word for word, _ in steps.pre_tokenize_str(text)], text


SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + SPACES
LLAMA3 = SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + OTHERS
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def cased(short: str, number: str) -> str:
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{UPPER}*{LOWER}+{short}|{before}{UPPER}+{LOWER}*{short}|{number}"
    return words + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SPACES


def split(*patterns: str, digits: bool = False) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    if digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    return pre_tokenizers.Sequence([*steps, LETTERS])


DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*" + SPACES
)
PUBLISHED = {
    "llama-3": (split(LLAMA3), True),
    "gpt-4": (split(LLAMA3), False),
    "qwen2": (split(LLAMA3.replace("{1,3}", "")), False),
    "mistral-nemo": (split(cased("", r"\p{N}")), True),
    "gpt-4o": (split(cased(f"{SHORT}?", r"\p{N}{1,3}")), False),
    "deepseek-v3": (split(r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK), False),
    "deepseek-coder": (
        split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", digits=True),
        False,
    ),
    "bloom": (split(r" ?[^(\s|.,!?…。，、।۔،)]+"), False),
    "starcoder": (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
        False,
    ),
}


def cut_otherwise(row_name: str, text: str, backend: Tokenizer) -> bool:
    """Whether the file's note tells that llama.cpp cuts this text otherwise."""
    (row,) = [row for row in PRE_TOKENIZERS if row.name == row_name]
    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in row.splits]
    steps = pre_tokenizers.Sequence([*splits, LETTERS])
    return bool(row.published) and steps.pre_tokenize_str(
        text
    ) != backend.pre_tokenizer.pre_tokenize_str(text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_of_published_pre_tokenizers(name, tmp_path):
    steps, ignore_merges = PUBLISHED[name]
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = steps
    trainer = BpeTrainer(
        vocab_size=3000,
        special_tokens=["<s>", "</s>", "<|im_start|>"],
        initial_alphabet=LETTERS.alphabet(),
        show_progress=False,
    )
    texts = list(probe_texts())
    backend.train_from_iterator(texts * 2, trainer)
    found = written(backend, tmp_path / "t.gguf")
    with opened(tmp_path / "t.gguf") as vocabulary:
        same = 0
        for text in texts:
            if cut_otherwise(found.kind.pre, text, backend):
                continue
            assert vocabulary.ids(text) == backend.encode(text).ids, text
            same += 1
    assert same > len(texts) / 2


def written(backend: Tokenizer, path: Path, name: str = "tiny"):
    size = backend.get_vocab_size()
    unknown = {} if backend.token_to_id("<unk>") is None else {"unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **unknown
    )
    found = convert_tokenizer(tokenizer, LlamaConfig(vocab_size=size))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(found.named(name))
    add_tokenizer_metadata(writer, found)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return found


def test_ids_of_gemmas_tokenizer(tmp_path):
    """With its runs of spaces and of new lines, whose ranks are mixed, and its added tokens."""
    pieces = ["<pad>", "</s>", "<s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    runs = [letter * count for letter in ("▁", "\n") for count in range(2, 17)]
    words = ["th", "the", "▁th", "▁the", "in", "an", "▁a", "er", "on", "▁i", "▁is", "re"]
    letters = sorted(
        {letter for text in probe_texts() for letter in text.replace(" ", "▁")} - {"é"}
    )
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *runs, *words, *letters])}
    ranked = [(0.0, run) for run in runs] + [(-1.0 - n, word) for n, word in enumerate(words)]
    pairs = [
        (score, len(word[:cut]), len(word[cut:]), word[:cut], word[cut:])
        for score, word in ranked
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    merges = [(left, right) for *_, left, right in pairs]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.add_special_tokens(["<pad>", "</s>", "<s>"])
    backend.add_tokens([AddedToken(run, normalized=False) for run in runs])
    found = written(backend, tmp_path / "t.gguf")
    assert found.notes == () and not found.kind.add_space_prefix
    with opened(tmp_path / "t.gguf") as vocab:
        for text in [*probe_texts(), "a" + "\n" * 40 + " " * 40 + "the end", "▁▁ the<s> is</s>\n"]:
            assert vocab.ids(text) == backend.encode(text).ids, text


@pytest.mark.parametrize("name", ["tiny", "My Phi3 run"])
@pytest.mark.parametrize("strips", [True, False])
def test_spaces_behind_phi3s_tokens(name, strips, tmp_path):
    """Which llama.cpp takes away by the model's name alone, and loads no other so named."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc"]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "▁a", "ab"])}
    merges = [("▁", "a"), ("a", "b")]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    kept = ["<unk>", "<s>", *(["<|endoftext|>"] if strips else [])]
    backend.add_special_tokens(kept)
    backend.add_special_tokens(
        [AddedToken(each, rstrip=strips) for each in ("</s>", "<|user|>", "<|end|>")]
    )
    found = written(backend, tmp_path / "t.gguf", name)
    assert found.strips_as_phi3 is strips and found.notes == ()
    with opened(tmp_path / "t.gguf") as vocab:
        for text in ["<|user|>  ab c<|end|>\n a</s> b", "a <s>  b<|user|> <|end|>"]:
            assert vocab.ids(text) == backend.encode(text).ids, text
