"""What a shape of rows says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from graft.errors import GraftError
from graft.text import listed

Holds = Literal["answers", "pairs", "judgements"]
"""answers: texts to imitate. pairs: a chosen and a rejected answer to one prompt. judgements: an
answer, and whether it is a wanted one."""


class Tokenizer(Protocol):
    """What the data layer uses of a fast Hugging Face tokenizer."""

    @property
    def is_fast(self) -> bool:
        """Whether it is backed by the tokenizers library."""

    @property
    def chat_template(self) -> Any:
        """The Jinja template of conversations, or None."""

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """What a template knows of the tokenizer, by name: bos_token, eos_token ..."""

    @property
    def bos_token(self) -> str | None:
        """The text of the token that begins a sequence, or None."""

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a sequence, or None."""

    @property
    def backend_tokenizer(self) -> Any:
        """The tokenizer of the tokenizers library."""

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]:
        """Encode texts."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """Render messages as text."""

    def convert_ids_to_tokens(self, ids: list[int]) -> Any:
        """Return the tokens' own spelling."""


@dataclass(frozen=True)
class Rendered:
    """A text and its trained parts, as sorted [start, end) character spans.

    It is tokenised in pieces: generation begins at the start of a span and ends at its end, so no
    token straddles one.
    """

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    """What an objective reads of the row besides its text; it is handed on as `Example.values`."""
    seams: tuple[int, ...] = ()
    """Further places that no token straddles: both ends of an answer that is not trained."""
    remarks: tuple[str, ...] = ()
    """What the user should know of the row, as clauses that complete 'in N rows'."""
    others: tuple[Rendered, ...] = ()
    """Further sequences of the row, each as a text of its own, which stay with it: the rejected
    answer of a pair, with its prompt."""


class Continuation(NamedTuple):
    """A row as a prompt to continue, and what its own answer is."""

    fields: Mapping[str, Any]
    """What the prompt is rendered from."""
    text: str
    """The prompt for a reader's eyes: as the row has it, without template or separator."""
    reference: str


class RowShape(ABC):
    """A shape of rows: its keys, its check, its text and the prompt that asks for an answer."""

    name: str
    required: tuple[str, ...]
    """A row that has these keys is one of this shape; the first of them holds the prompt."""
    optional: tuple[str, ...] = ()
    """Keys whose value is '' where it is missing or null."""
    may_be_empty: tuple[str, ...] = ()
    """Those of the required keys in which nothing is trained."""
    article = "a"
    """What stands before the name in a message."""
    is_conversation = False
    """Whether prompts go through the chat template, and may be whole conversations."""
    uses_separator = False
    """Whether --separator stands between a prompt and its answer."""
    is_document = False
    """Whether a row that is too long is cut into windows, each of which is trained."""
    has_prompts = True
    """Whether a row has a prompt that a model can continue, and an answer to compare that with."""
    continued_by_default = False
    """Whether a comparison of models continues prompts without being asked to."""
    holds: Holds = "answers"
    """What rows of it have to learn from."""

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is read of a row, by key."""
        found = {key: row[key] for key in self.required}
        for key in self.optional:
            found[key] = "" if row.get(key) is None else row[key]
        return found

    def problems(self, fields: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with the values of a row: texts, none of them empty that trains."""
        found = []
        for key, value in fields.items():
            if wrong := text_problem(value):
                found.append(f"{key!r} {wrong}")
            elif key in self.required and key not in self.may_be_empty and not value.strip():
                found.append(f"{key!r} is empty")
        return found

    @abstractmethod
    def render(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> Rendered:
        """Render a checked row; the text up to each span is what generation is prompted with.

        Raises GraftError when the row cannot be rendered.
        """

    def prompt(self, given: str | Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> str:
        """Render a prompt exactly as training rendered what stands before the trained part.

        A string stands for what a user writes (`asked`); a mapping holds the row's keys, of which
        those of the answer are not read. Raises GraftError when the key of the prompt is missing or
        the prompt cannot be rendered.
        """
        return self.render_prompt(self.given(given), tokenizer, separator)

    def opening(
        self, given: str | Mapping[str, Any], tokenizer: Tokenizer, separator: str
    ) -> Rendered:
        """Return `prompt` with the seams that training has before an answer."""
        return Rendered(self.prompt(given, tokenizer, separator))

    def given(self, given: str | Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the keys of a prompt; raises GraftError when that of the prompt is missing."""
        fields = self.asked(given) if isinstance(given, str) else given
        key = self.required[0]
        if key not in fields:
            raise GraftError(
                f"a prompt of kind {self.name} needs the key {key!r}; found keys {listed(fields)}"
            )
        return fields

    def asked(self, text: str) -> dict[str, Any]:
        """Return the keys of a prompt that is nothing but a text."""
        return {self.required[0]: text}

    @abstractmethod
    def render_prompt(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> str:
        """Render the prompt of a row, whose answer may be missing; see `prompt`."""

    def continuation(self, fields: Mapping[str, Any]) -> Continuation:
        """Return a row as a prompt to continue; only asked of a shape that `has_prompts`."""
        raise NotImplementedError(self.name)


class AnsweredShape(RowShape):
    """Rows of a prompt and its answer: text = prompt + answer, and the answer is trained."""

    answer: str
    """The key of the answer."""
    continued_by_default = True

    def render(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> Rendered:
        """Render a checked row; its answer is the one trained span."""
        prompt = self.prompt(fields, tokenizer, separator)
        text = prompt + fields[self.answer]
        return Rendered(text, ((len(prompt), len(text)),))

    def continuation(self, fields: Mapping[str, Any]) -> Continuation:
        """Return the row's prompt and its answer."""
        return Continuation(fields, fields[self.required[0]], fields[self.answer])


def text_problem(value: object) -> str | None:
    """Return what keeps a value from being a text that a tokenizer can read."""
    if not isinstance(value, str):
        return f"is {type_in_words(value)}; expected a string"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        return f"holds half of a surrogate pair ({half} at character {error.start}); remove it"
    return None


def type_in_words(value: object) -> str:
    """Return what a value of JSON is, as messages say it."""
    if value is None:
        return "null"
    names: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")
