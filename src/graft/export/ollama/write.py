"""Writing a folder for `ollama create`: the GGUF file, and a Modelfile that says how to prompt it.

The syntax is that of https://docs.ollama.com/modelfile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from graft.data.chat import chat_prompt
from graft.data.render import render_prompt
from graft.data.shapes.registry import SHAPES
from graft.errors import GraftError
from graft.export.gguf.metadata import context_length
from graft.export.gguf.tensors import Unquantised
from graft.export.gguf.tokenizer import convert_tokenizer
from graft.export.gguf.write import OnTensor, export_gguf
from graft.export.ollama.chat_probe import chat_joints, checked_template
from graft.export.ollama.go_template import go_text, render_go
from graft.files.write import new_folder
from graft.model.load import LoadedModel
from graft.text import quoted
from graft.understood import tokenizing

GGUF_FILE = "model.gguf"
MODELFILE = "Modelfile"
_DEFAULT_CONTEXT = 4096
"""Ollama's own num_ctx, in tokens, where memory is scarce; a model may have less."""
_SETTINGS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "num_predict",
}
"""Ollama's parameters by Transformers' names."""
_SENTINEL = "sentinelprompt"


@dataclass(frozen=True)
class OllamaPrompt:
    """How Ollama is to dress what the user writes."""

    template: str
    """In Go's syntax."""
    bos: str
    """What the chat template begins with and this one does not, because llama.cpp writes it."""
    ends: tuple[str, ...]
    """What ends an answer besides the tokens that the model names."""
    notes: tuple[str, ...]


def ollama_prompt(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, kind: str, separator: str
) -> OllamaPrompt:
    """Return Ollama's template for a model trained on rows of a kind, checked by rendering it.

    Raises GraftError when Ollama's templates cannot say what the tokenizer's does.
    """
    if not SHAPES[kind].is_conversation:
        text = render_prompt(kind, _SENTINEL, tokenizer, separator)
        before, _, behind = text.partition(_SENTINEL)
        template = f"{go_text(before)}{{{{ .Prompt }}}}{go_text(behind)}"
        if render_go(template, {"Prompt": _SENTINEL}) != text:
            raise GraftError(
                f"the prompt {quoted(text)} cannot be written as a template of Ollama's"
            )
        return OllamaPrompt(template, "", (), ())
    if "strftime_now" in str(tokenizer.chat_template):
        raise GraftError(
            "the chat template writes today's date, which Ollama's templates cannot; export with "
            "--to gguf: llama.cpp takes the template as it is"
        )

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        return chat_prompt(messages, tokenizer)

    joints = chat_joints(render)
    bos = str(tokenizer.bos_token) if convert_tokenizer(tokenizer, config).add_bos else ""
    rest = joints.without_start(bos)
    template, notes = checked_template(rest, render, bos)
    behind = joints.assistant_user.lstrip()
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    ends = sorted((token for token in added if behind.startswith(token)), key=len)[-1:]
    return OllamaPrompt(template, "" if rest == joints else bos, tuple(ends), notes)


def export_ollama(
    loaded: LoadedModel,
    folder: Path,
    *,
    kind: str,
    separator: str,
    unquantised: Unquantised,
    name: str = "",
    on_tensor: OnTensor | None = None,
) -> tuple[str, ...]:
    """Write the folder, and return notes on what Ollama does a little differently.

    Raises GraftError, with every reason, when llama.cpp or Ollama cannot hold the model.
    """
    prompt = ollama_prompt(loaded.tokenizer, loaded.model.config, kind, separator)
    text = modelfile(loaded, prompt)
    with new_folder(folder) as part:
        report = export_gguf(
            loaded.model,
            loaded.tokenizer,
            part / GGUF_FILE,
            unquantised=unquantised,
            name=name or Path(GGUF_FILE).stem,  # and not the folder's, which may be renamed
            on_tensor=on_tensor,
        )
        (part / MODELFILE).write_text(text, encoding="utf-8")
    return report.notes + prompt.notes


def modelfile(loaded: LoadedModel, prompt: OllamaPrompt) -> str:
    """Return the contents of the Modelfile."""
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{GGUF_FILE}", ""]
    if prompt.bos:
        lines.append(
            f"# The chat template begins with {prompt.bos!r}; llama.cpp puts it there itself."
        )
    lines += [f'TEMPLATE """{prompt.template}"""', ""]
    lines += [f"PARAMETER stop {_quoted(text)}" for text in _stops(loaded, prompt.ends)]
    lines += [f"PARAMETER {name} {value}" for name, value in _settings(loaded)]
    return "\n".join(lines) + "\n"


def _stops(loaded: LoadedModel, ends: tuple[str, ...]) -> list[str]:
    """Return the texts that end an answer: the model's tokens for it, then the template's."""
    named: list[int] = []
    generation = loaded.model.generation_config
    for ids in (
        loaded.tokenizer.eos_token_id,
        None if generation is None else generation.eos_token_id,
        loaded.model.config.eos_token_id,
    ):
        named += ids if isinstance(ids, list) else [] if ids is None else [ids]
    with tokenizing():
        texts = [str(loaded.tokenizer.decode([index])) for index in named]
    return [text for text in dict.fromkeys([*texts, *ends]) if text]


def _quoted(text: str) -> str:
    """Return a value of a Modelfile, which knows no escapes.

    Raises GraftError when no quotes can hold it.
    """
    if '"""' in text or not all(letter.isprintable() or letter in "\n\t" for letter in text):
        raise GraftError(
            f"the token {quoted(text)} ends an answer, and a Modelfile cannot hold it; name "
            "another eos_token in tokenizer_config.json and generation_config.json"
        )
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


def _settings(loaded: LoadedModel) -> Iterator[tuple[str, float | int]]:
    """Yield Ollama's parameters for what generation_config.json says, and a short context."""
    generation = loaded.model.generation_config
    stored = {} if generation is None else generation.to_dict()
    greedy = stored.get("do_sample") is False
    if greedy:
        yield "temperature", 0
    for theirs, ours in _SETTINGS.items():
        sampling = theirs not in ("repetition_penalty", "max_new_tokens")
        value = stored.get(theirs)
        if value is None or (greedy and sampling):
            continue
        # A text in its place could bring lines of its own into the Modelfile.
        if type(value) not in (int, float) or not math.isfinite(value):
            raise GraftError(
                f"generation_config.json: {theirs} is {quoted(value)}; expected a finite number"
            )
        yield ours, value
    context = context_length(loaded.model.config)
    if context < _DEFAULT_CONTEXT:
        yield "num_ctx", context
