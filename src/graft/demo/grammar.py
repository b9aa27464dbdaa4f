"""A grammar of invented products: the demo's task, from attributes to a description.

Held-out products share no brand and no combination of attribute values with the training rows or
with the text that the base model is pre-trained on.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from graft.demo.words import (
    ADJECTIVES,
    BRAND_ENDS,
    BRAND_STARTS,
    CATEGORIES,
    CLAUSES,
    MODELS,
)

_OPENINGS = (
    "The {name} is {thing}",
    "With the {name} you get {thing}",
    "{name} is the name of {thing}",
)
_SUBJECTS = ("It", "It", "This {category}", "The {name}")


@dataclass(frozen=True)
class Product:
    """An invented product: its name, category and (kind, value) facts in the sheet's order."""

    name: str
    category: str
    facts: tuple[tuple[str, str], ...]


def is_held_out(text: str) -> bool:
    """Say on which side of the fixed split a brand or attribute combination falls (1 in 10)."""
    return zlib.crc32(text.encode()) % 10 == 0


def draw_product(rng: random.Random, held_out: bool = False) -> Product:
    """Draw a product with 3 to 6 facts from the training or the held-out side of the split."""
    while True:
        brand = rng.choice(BRAND_STARTS) + rng.choice(BRAND_ENDS)
        if is_held_out(brand) == held_out:
            break
    name = f"{brand} {rng.choice(MODELS)}"
    while True:
        category = rng.choice(tuple(CATEGORIES))
        pools = CATEGORIES[category]
        kinds = rng.sample(tuple(pools), rng.randint(3, 6))
        facts = tuple((kind, rng.choice(pools[kind])) for kind in kinds)
        if is_held_out(combination(category, facts)) == held_out:
            return Product(name, category, facts)


def combination(category: str, facts: tuple[tuple[str, str], ...]) -> str:
    """Return the category and the facts as one text that does not depend on the facts' order."""
    return "|".join([category, *sorted(f"{kind}={value}" for kind, value in facts)])


def with_article(phrase: str) -> str:
    """Put 'a' or 'an' before a phrase."""
    return ("an " if phrase[0].lower() in "aeio" else "a ") + phrase


def clause(rng: random.Random, kind: str, value: str) -> str:
    """Return a verb phrase that states one fact, such as 'weighs 1.2 kg'."""
    return rng.choice(CLAUSES[kind]).format(v=value, a=with_article(value))


def noun_phrase(product: Product, kinds: tuple[str, ...]) -> str:
    """Return article, adjectives and category: 'a slim green oak table' for the given kinds."""
    values = dict(product.facts)
    words = [values[kind] for kind in ADJECTIVES if kind in kinds and kind in values]
    return with_article(" ".join([*words, product.category]))


def sentences(rng: random.Random, clauses: list[str], subjects: list[str]) -> list[str]:
    """Join one or two clauses at a time into sentences, in order."""
    done = []
    rest = list(clauses)
    while rest:
        count = rng.choice((1, 2, 2))
        text = f"{rng.choice(subjects)} {' and '.join(rest[:count])}."
        done.append(text[0].upper() + text[1:])
        rest = rest[count:]
    return done


def prompt(product: Product) -> str:
    """Return the task's prompt: 'name: Bel Arc | category: lamp | colour: green | ...'."""
    fields = [("name", product.name), ("category", product.category), *product.facts]
    return " | ".join(f"{key}: {value}" for key, value in fields)


def describe(product: Product, rng: random.Random) -> str:
    """Return a fluent description of the product that mentions every one of its facts."""
    clauses = [clause(rng, k, v) for k, v in product.facts if k not in ADJECTIVES]
    thing = noun_phrase(product, ADJECTIVES)
    opening = rng.choice(_OPENINGS).format(name=product.name, thing=thing)
    if clauses and rng.random() < 0.5:
        opening += f" that {clauses.pop(0)}"
    subjects = [s.format(name=product.name, category=product.category) for s in _SUBJECTS]
    return " ".join([f"{opening}.", *sentences(rng, clauses, subjects)])


def task_rows(seed: int, count: int, held_out: bool = False) -> Iterator[dict[str, str]]:
    """Yield `count` fine-tuning rows {"prompt", "completion"}; the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        product = draw_product(rng, held_out)
        yield {"prompt": prompt(product), "completion": describe(product, rng)}
