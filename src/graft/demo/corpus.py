"""The text that the demo's base is pre-trained on: product prose in every form but the task's.

Each text repeats names and values that it gave before, so that a small model learns to copy them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from graft.demo.grammar import (
    Product,
    clause,
    draw_product,
    noun_phrase,
    sentences,
    with_article,
)
from graft.demo.words import ADJECTIVES, COLOURS, MODELS, ORIGINS

_QUESTIONS = {
    "weight": "How heavy is {it}?",
    "price": "How much is {it}?",
    "colour": "What colour is {it}?",
    "origin": "Where is {it} from?",
    "use": "What is {it} good for?",
    "care": "How do I clean {it}?",
}
_ANSWERS = ("{Name}: {c}.", "The {name} {c}.", "It {c}.", "{V}.", "The {name}? It {c}.")
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def _clauses(rng: random.Random, product: Product, but_for: tuple[str, ...] = ()) -> list[str]:
    return [clause(rng, kind, value) for kind, value in product.facts if kind not in but_for]


def _told(
    rng: random.Random, product: Product, but_for: tuple[str, ...], subjects: list[str]
) -> list[str]:
    """The product's facts, but for some kinds, as sentences in the sheet's order."""
    return sentences(rng, _clauses(rng, product, but_for), subjects)


def _values(product: Product) -> list[str]:
    return [value for _, value in product.facts]


def _listing(rng: random.Random, product: Product) -> str:
    """A specification sheet in one of several layouts."""
    facts = product.facts
    layout = rng.randrange(5)
    if layout == 0:
        lines = [f"- {kind} = {value}" for kind, value in facts]
        return f"{product.name} ({product.category})\n" + "\n".join(lines)
    if layout == 1:
        return f"{product.name}, {product.category}; " + "; ".join(_values(product))
    if layout == 2:
        return f"[{product.category}] {product.name} [" + "] [".join(_values(product)) + "]"
    if layout == 3:
        pairs = ", ".join(f"{kind} {value}" for kind, value in facts)
        return f"{product.name} / {product.category} / {pairs}"
    lines = [f"{kind.upper()} {value}" for kind, value in facts]
    return f"{product.category.upper()} {product.name}\n" + "\n".join(lines)


def _sheet_and_story(rng: random.Random) -> str:
    """A sheet, then someone tells the same facts in prose."""
    product = draw_product(rng)
    listing = _listing(rng, product)
    subjects = ["it", f"the {product.category}", f"the {product.name}"]
    if rng.random() < 0.3:
        who = rng.choice(("We", "I", "They", "Our shop", "My friend"))
        verb = rng.choice(("sold", "packed", "found", "tried", "liked", "bought"))
        told = [f"{who} {verb} the {product.name}.", *_told(rng, product, (), subjects)]
    else:
        start = rng.choice(("Here we have {t}, the {n}.", "We made {t}: {n}.", "See {n}, {t}."))
        thing = noun_phrase(product, ADJECTIVES)
        told = [
            start.format(t=thing, n=product.name),
            *_told(rng, product, ADJECTIVES, subjects),
        ]
    return "\n".join((listing, " ".join(told)))


def _advert(rng: random.Random) -> str:
    """A short ad."""
    product = draw_product(rng)
    thing = noun_phrase(product, ADJECTIVES)
    start = rng.choice(
        (
            "New! {name}, {thing}.",
            "Meet {name}: {thing}!",
            "Only this {day}: {name}, {thing}.",
            "Say hello to {name}, {thing} for you.",
        )
    ).format(name=product.name, thing=thing, day=rng.choice(_DAYS))
    end = rng.choice(("Get {0} today.", "Ask for {0}!", "{0}, only here.", "Try {0} now!"))
    body = _told(rng, product, ADJECTIVES, ["it", product.name, f"this {product.category}"])
    return " ".join([start, *body, end.format(product.name)])


def _review(rng: random.Random) -> str:
    """A customer's review."""
    product = draw_product(rng)
    start = rng.choice(
        (
            "I bought the {name} on {day}.",
            "My {name} came on {day}.",
            "{stars} stars for the {name}.",
            "The {name} was a gift from my sister.",
        )
    ).format(name=product.name, day=rng.choice(_DAYS), stars=rng.randint(1, 5))
    end = rng.choice(
        (
            "I would buy the {} again.",
            "My {} broke after a week.",
            "The {} is a joy to own.",
            "I sent the {} back.",
        )
    ).format(product.name)
    body = _told(rng, product, (), ["it", f"the {product.category}", "mine"])
    return " ".join([f"Review of {product.name}:", start, *body, end])


def _questions(rng: random.Random) -> str:
    """A sheet and questions about it, with answers."""
    product = draw_product(rng)
    thing = noun_phrase(product, ADJECTIVES)
    lines = [_listing(rng, product), f"Q. What is the {product.name}?\nA. It is {thing}."]
    for kind, value in rng.sample(product.facts, min(3, len(product.facts))):
        question = _QUESTIONS.get(kind, f"What {kind} does {{it}} have?")
        it = rng.choice((f"the {product.name}", f"the {product.category}", "it"))
        answer = rng.choice(_ANSWERS).format(
            name=product.name, Name=product.name, c=clause(rng, kind, value), V=value
        )
        lines.append(f"Q. {question.format(it=it)}\nA. {answer}")
    return "\n".join(lines)


def _comparison(rng: random.Random) -> str:
    """Two products of one kind side by side."""
    one, two = draw_product(rng), draw_product(rng)
    lines = [f"{_listing(rng, one)}\n{_listing(rng, two)}"]
    first, second = rng.sample((one, two), 2)
    pairs = zip(_clauses(rng, first)[:3], _clauses(rng, second)[:3], strict=True)
    for left, right in pairs:
        joint = rng.choice((", while", ", but", "; on the other hand,"))
        lines.append(f"The {first.name} {left}{joint} the {second.name} {right}.")
    return lines[0] + "\n" + " ".join(lines[1:])


def _order(rng: random.Random) -> str:
    """A letter about an order, with the goods repeated."""
    goods = [draw_product(rng) for _ in range(rng.randint(1, 3))]
    listed = "\n".join(
        f"{rng.randint(1, 9)} x {p.name}, {p.category}, {', '.join(_values(p)[:3])}" for p in goods
    )
    told = " ".join(
        f"The {p.name} is {with_article(p.category)} with {', '.join(_values(p)[:3])}."
        for p in rng.sample(goods, len(goods))
    )
    return f"Your order of {rng.choice(_DAYS)}:\n{listed}\nThank you for your order! {told}"


def _stock(rng: random.Random) -> str:
    """Lines of a stock list in one layout, with no prose at all."""
    goods = [draw_product(rng) for _ in range(rng.randint(3, 5))]
    layout = rng.choice(("name: {} | stock: {} | shelf: {}", "{} | {} | {}", "{}: {}, {}"))
    return "\n".join(
        layout.format(p.name, rng.randint(1, 90), rng.choice(_values(p))) for p in goods
    )


def _echo(rng: random.Random) -> str:
    """Words read out and read back: copying, and nothing else."""
    pool = [draw_product(rng) for _ in range(3)]
    words = [p.name for p in pool] + [v for p in pool for v in _values(p)[:3]]
    words += [rng.choice(MODELS), rng.choice(COLOURS), rng.choice(ORIGINS)]
    rng.shuffle(words)
    line = rng.choice((", ", "; ", " / ")).join(words[: rng.randint(4, 10)])
    return f"Read: {line}.\nAgain: {line}."


FORMS: dict[Callable[[random.Random], str], int] = {
    _sheet_and_story: 9,
    _advert: 1,
    _review: 1,
    _questions: 3,
    _comparison: 1,
    _order: 1,
    _stock: 1,
    _echo: 1,
}


def pretraining_rows(seed: int, count: int, characters: int = 360) -> Iterator[dict[str, str]]:
    """Yield `count` rows {"text"}, each of as many texts as fit in `characters`."""
    rng = random.Random(seed)
    forms, weights = tuple(FORMS), tuple(FORMS.values())
    waiting = rng.choices(forms, weights)[0](rng)
    for _ in range(count):
        text = waiting
        waiting = rng.choices(forms, weights)[0](rng)
        while len(text) + len(waiting) + 2 <= characters:
            text += "\n\n" + waiting
            waiting = rng.choices(forms, weights)[0](rng)
        yield {"text": text}
