"""Mutations of chat templates and of tokenizers."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

from fuzz_json import JSON, dump
from fuzz_mutation import BYTES, TEXT, Expect, Mutation, choose

_PIECES = (
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(1000000000) %}{{ i }}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'text' * 99999 }}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 'a' * 300000 }}",
    "{{ 10 ** 10 ** 8 }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ undefined.attribute }}",
    "{{ undefined }}",
    "{{ messages[0]['nothing'].more }}",
    "{{ messages[99] }}",
    "{{ raise_exception('no' * 2000) }}",
    "{{ raise_exception('\x1b[31m') }}",
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ self }}{{ loop }}{{ lipsum(9) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set x = [] %}{% for i in range(99999999) %}{{ x.append(i) }}{% endfor %}",
    "{% include 'other' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% unknown %}",
    "{% if %}",
    "{% for %}",
    "{{",
    "{#",
    "{% raw %}",
    "{{ messages | tojson | safe }}",
    "{{ messages | sort(attribute='role') }}",
    "{{ strftime_now('%Y' * 99999) }}",
    "{{ eos_token * 9999 }}",
    "{% generation %}x{% endgeneration %}",
    "{{ messages | map('upper') | list }}",
    "{% set messages = 3 %}",
    "{{ '\\ud800' }}",
    "{{ '\x00' }}",
    "\x1b[31m",
    "{{ (" + "(" * 2000,
    "{{ " + "-" * 3000 + "1 }}",
    "{% if 1 %}" * 2000,
)


def piece(data: bytes, rng: Random) -> Mutation:
    """Put a piece of template somewhere between two tags, or in the template's place."""
    text, added = data.decode(), rng.choice(_PIECES)
    places = [0, len(text), *(n + 2 for n in range(len(text)) if text.startswith(("%}", "}}"), n))]
    place = rng.choice(places)
    changed = added if rng.random() < 0.2 else text[:place] + added + text[place:]
    return Mutation(changed.encode(), f"{added[:50]!r} at {place}")


def text(data: bytes, rng: Random) -> Mutation:
    """Any change of a text; all of a template is text to be written, a byte order mark too."""
    return replace(TEXT(data, rng), expect=Expect.ANY)


JINJA = choose([(5, piece), (1, text), (1, BYTES)])


_PATTERNS = ("(a+)+$", "(", "(?:x{1000}){1000}", "(?i:'s)|[^a]{99999}", "\\p{Nothing}", "", "a|")
_KINDS = {
    "normalizer": (
        "NFC",
        "Lowercase",
        "Replace",
        "Precompiled",
        "Prepend",
        "Nothing",
        "BertNormalizer",
    ),
    "pre_tokenizer": (
        "Split",
        "Digits",
        "Metaspace",
        "Whitespace",
        "Sequence",
        "Nothing",
        "ByteLevel",
    ),
    "post_processor": (
        "TemplateProcessing",
        "RobertaProcessing",
        "ByteLevel",
        "Sequence",
        "Nothing",
    ),
    "decoder": ("WordPiece", "Replace", "Metaspace", "CTC", "Sequence", "Fuse", "Nothing"),
    "model": ("BPE", "WordPiece", "WordLevel", "Unigram", "Nothing"),
}


def tokenizer_part(data: bytes, rng: Random) -> Mutation:
    """Another part, an odd vocabulary, odd added tokens."""
    value = json.loads(data)
    kind = rng.randrange(6)
    if kind == 0:
        part = rng.choice(list(_KINDS))
        name = rng.choice(_KINDS[part])
        value[part] = {
            **{"type": name, "pattern": {"Regex": rng.choice(_PATTERNS)}, "content": "x"},
            **{"behavior": "Isolated", "invert": False, "replacement": "_", "prepend": "x"},
            **{"vocab": {"a": 0}, "unk_token": "nothing", "merges": [], "single": [], "pair": []},
            **{"special_tokens": {}, "sep": ["a", 10**9], "cls": ["b", 0], "decoders": []},
        }
        what = f"{part} is {name}"
    elif kind == 1:
        token = rng.choice(list(value["model"]["vocab"]))
        number = rng.choice((-1, 10**6, 2**31, 2**32 - 1, 2**63, 0, 1.5, None, len(value)))
        value["model"]["vocab"][token] = number
        what = f"token {token!r} is {number}"
    elif kind == 2:
        added = {
            "id": rng.choice((0, 5, 10**6, 2**32 - 1, -1)),
            "content": rng.choice(("", "red", "\x1b[31m")),
        }
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), True)
        value["added_tokens"].append(added | flags)
        what = f"token added: {added}"
    elif kind == 3:
        merges = ([["a", "nothing"]], ["a b c"], [["a"]], [[]], "x", [["a", "b"]] * 10_000)
        value["model"]["merges"] = rng.choice(merges)
        what = f"merges = {str(value['model']['merges'])[:30]}"
    elif kind == 4:
        limit = rng.choice((0, 1, -1, 2**63))
        value["truncation"] = {
            "direction": "Right",
            "max_length": limit,
            "strategy": "LongestFirst",
            "stride": 2,
        }
        what = f"truncation to {limit}"
    else:
        token = rng.choice(("<|end|>", "a", "red"))
        value["model"]["vocab"].pop(token, None)
        what = f"without token {token!r}"
    return Mutation(dump(value), what)


TOKENIZER = choose([(2, tokenizer_part), (3, JSON)])
