"""Text from data, where it is shown."""

from __future__ import annotations

from graft.text import reason, shown


def test_a_short_message_is_shown_as_it_is() -> None:
    assert shown("one\n  - two\ttabs and \u20ac") == "one\n  - two\ttabs and \u20ac"


def test_nothing_in_a_message_acts_on_a_terminal() -> None:
    assert shown("\x1b[31mred\x07") == "\\x1b[31mred\\x07"


def test_a_long_message_keeps_its_beginning_the_remedy_and_a_count() -> None:
    text = shown(f"x is {'a' * 300_000}; give another")
    assert text.startswith("x is aaa") and text.endswith("a; give another") and len(text) < 500
    text = shown("\n".join(f"problem {number} is here" for number in range(5000)))
    *kept, last = text.splitlines()
    assert kept[0] == "problem 0 is here" and last == f"  ... and {5000 - len(kept)} more lines"
    assert len(text) <= 2000


def test_a_reason_is_one_harmless_line_or_the_kind() -> None:
    assert reason(ValueError("a\n  b\x1b")) == "a b\\x1b"
    assert reason(ZeroDivisionError()) == "ZeroDivisionError"
    assert len(reason(ValueError("a" * 300_000))) == 303
