"""The demo's grammar and the bundled assets."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer

import graft.demo
from graft.demo.corpus import FORMS, pretraining_rows
from graft.demo.grammar import (
    combination,
    describe,
    draw_product,
    is_held_out,
    prompt,
    task_rows,
)
from graft.demo.words import ADJECTIVES, BRAND_ENDS, BRAND_STARTS, CATEGORIES, CLAUSES
from graft.evaluate.scores import share_mentioned

ASSETS = Path(graft.demo.__file__).parent / "assets"
BRANDS = {start + end for start, end in itertools.product(BRAND_STARTS, BRAND_ENDS)}


def read_rows(name: str) -> list[dict[str, str]]:
    with (ASSETS / "data" / name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def facts_of(row: dict[str, str]) -> tuple[str, frozenset[str]]:
    """The brand and the unordered fields after the name, read from the prompt by hand."""
    fields = row["prompt"].split(" | ")
    return fields[0].removeprefix("name: ").split()[0], frozenset(fields[1:])


def test_completions_mention_every_attribute_in_proper_sentences() -> None:
    for row in itertools.chain(task_rows(11, 400), task_rows(12, 400, held_out=True)):
        assert share_mentioned(row["prompt"], row["completion"]) == 1.0, row
        assert re.fullmatch(r"(?:[A-Z].*?\.(?: |$))+", row["completion"]), row
        assert not re.search(r"\ba [aeio]|\ban [^aeio]|[{}]|  ", row["completion"]), row


def test_same_seed_same_rows_other_seed_other_rows() -> None:
    assert list(task_rows(3, 20)) == list(task_rows(3, 20))
    assert list(task_rows(3, 20)) != list(task_rows(4, 20))
    assert list(pretraining_rows(3, 5)) == list(pretraining_rows(3, 5))
    assert list(pretraining_rows(3, 5)) != list(pretraining_rows(4, 5))


def test_every_kind_has_phrases_and_every_category_enough_kinds() -> None:
    for category, pools in CATEGORIES.items():
        assert len(pools) >= 6, category
        assert set(pools) <= set(CLAUSES), category
        values = [value for pool in pools.values() for value in pool]
        assert all(value.strip() and "|" not in value and ":" not in value for value in values)
    assert set(ADJECTIVES) <= set(CLAUSES)


def test_both_sides_of_the_split_are_drawn_apart() -> None:
    rng = random.Random(0)
    for held_out in (False, True):
        for _ in range(200):
            product = draw_product(rng, held_out)
            assert is_held_out(product.name.split()[0]) == held_out
            assert is_held_out(combination(product.category, product.facts)) == held_out
            assert describe(product, rng) != prompt(product)


def test_pretraining_text_has_no_held_out_brand_and_not_the_tasks_format() -> None:
    unseen = {brand for brand in BRANDS if is_held_out(brand)}
    assert 60 < len(unseen) < len(BRANDS) / 5
    for row in pretraining_rows(5, 300):
        assert not unseen & set(re.findall(r"[A-Z][a-z]+", row["text"]))
        assert "category: " not in row["text"]
        assert 60 < len(row["text"]) <= 600


def test_every_form_of_pretraining_text_repeats_what_it_named() -> None:
    rng = random.Random(1)
    for form in FORMS:
        texts = [form(rng) for _ in range(50)]
        assert not any(mark in text for text in texts for mark in "{}"), form
        counts = [Counter(re.findall(r"\b(?!The )[A-Z][a-z]+ [A-Z][a-z]+", text)) for text in texts]
        repeated = sum(max(count.values(), default=0) > 1 for count in counts)
        assert repeated == 0 if form.__name__ == "_stock" else repeated > 35, form


def test_bundled_rows_are_disjoint_and_whole() -> None:
    train, held_out = read_rows("train.jsonl"), read_rows("heldout.jsonl")
    assert len(train) >= 2000 and len(held_out) >= 200
    train_brands, train_facts = map(set, zip(*map(facts_of, train), strict=True))
    held_brands, held_facts = map(set, zip(*map(facts_of, held_out), strict=True))
    assert not train_brands & held_brands
    assert not train_facts & held_facts
    for row in train + held_out:
        assert share_mentioned(row["prompt"], row["completion"]) == 1.0


def test_bundled_assets_are_small() -> None:
    assert (ASSETS / "base" / "model.safetensors").stat().st_size <= 4_000_000
    assert sum(path.stat().st_size for path in (ASSETS / "data").iterdir()) < 1_000_000


def test_bundled_base_is_a_llama_that_gguf_blocks_fit() -> None:
    config = json.loads((ASSETS / "base" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["hidden_size"] % 32 == 0 and config["intermediate_size"] % 32 == 0
    tokenizer = Tokenizer.from_file(str(ASSETS / "base" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|endoftext|>") == config["eos_token_id"]
    assert tokenizer.token_to_id("<|pad|>") == config["pad_token_id"]


def test_tokenizer_gives_every_text_back_and_rows_are_short() -> None:
    tokenizer = Tokenizer.from_file(str(ASSETS / "base" / "tokenizer.json"))
    rows = read_rows("heldout.jsonl")
    texts = [row["prompt"] + "\n" + row["completion"] for row in rows]
    for text in [*texts, "naïve café, 日本語 — 3½ €\n\ttabs  and  spaces "]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    lengths = [len(tokenizer.encode(text).ids) for text in texts]
    assert max(lengths) <= 128
