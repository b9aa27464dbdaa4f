"""Which of several chat templates: a tokenizer may have some by name, and a file is another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.data.shapes.base import Tokenizer
from graft.errors import GraftError
from graft.files.read import read_text
from graft.text import listed, quoted

_TEMPLATE_BYTES = 2**20
_DEFAULT = "default"


def choose_template(tokenizer: Any, given: str | None, known: str | None = None) -> None:
    """Make a template of the tokenizer's, by its name, or one in a file, its only one from now on.

    None leaves those that it has. known: what `given` has stood for before. Raises GraftError that
    lists the names when it stands for none.
    """
    if given is not None:
        tokenizer.chat_template = known or _chosen(tokenizer, given)


def _chosen(tokenizer: Tokenizer, given: str) -> str:
    names = _names(tokenizer)
    if given in names:
        return names[given]
    path = Path(given)
    if path.is_file():
        return read_text(path, _TEMPLATE_BYTES)
    found = f"its own are {listed(names)}" if names else "it has none of its own"
    raise GraftError(
        f"--chat-template {quoted(given)}: no file, and no chat template of the tokenizer's "
        f"({found}); give a name of these, or a .jinja file"
    )


def check_chosen(tokenizer: Tokenizer) -> None:
    """Raise GraftError when the tokenizer has several templates, and none that is the default."""
    names = _names(tokenizer)
    if isinstance(tokenizer.chat_template, Mapping) and _DEFAULT not in names:
        raise GraftError(
            f"the chat template is one of several ({listed(names)}), none of which is called "
            f"{_DEFAULT!r}; choose one with --chat-template NAME"
        )


def _names(tokenizer: Tokenizer) -> dict[str, str]:
    template = tokenizer.chat_template
    if template is None:
        return {}
    return dict(template) if isinstance(template, Mapping) else {_DEFAULT: str(template)}
