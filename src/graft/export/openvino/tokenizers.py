"""The tokenizer as OpenVINO's own models, by openvino-tokenizers, where that is installed."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from transformers import PreTrainedTokenizerBase

from graft.errors import GraftError
from graft.export.openvino.graph_file import saved_graph
from graft.export.probe import PROBE, other_ids
from graft.model.folder import read_tokenizer
from graft.text import quoted, reason
from graft.understood import tokenizing, understood

PACKAGE = "openvino_tokenizers"
TOKENIZER, DETOKENIZER = "openvino_tokenizer.xml", "openvino_detokenizer.xml"
_WITHOUT = "without which OpenVINO GenAI's LLMPipeline does not open it"
_OF_THE_MACHINE = re.compile(r"(?!openvino_tokenizers)\w+_version|original_tokenizer_class")
"""What it writes of the programs that converted. Its own version stays: OpenVINO GenAI asks for
it, to tell files of before 2024.5."""
_RUNNING = re.compile(r"\b([A-Z]\w*)_\d+\b")
"""A name with OpenVINO's own running number, which goes on from whatever was made before."""


def write_openvino_tokenizer(folder: Path, rows: int) -> tuple[str, ...]:
    """Write both models of the tokenizer that lies in the folder, and return what is to be told.

    rows: the tokens that the model has.

    They are written only where they cut the texts of the probe into the tokenizer's own ids, and
    put these together again to the same text.
    """
    if find_spec(PACKAGE) is None:
        return (
            f"the folder has no {TOKENIZER}, {_WITHOUT}: pip install openvino-tokenizers, and "
            "export again",
        )
    tokenizer = read_tokenizer(folder)
    tokenizer.padding_side = "left"  # what an answer is to follow stands at the end
    if (tokenizer.pad_token_id or 0) >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        with understood("openvino-tokenizers", "has no form of this tokenizer"):
            models = _converted(tokenizer)
        differing = _differing(tokenizer, *models)
    except GraftError as error:
        differing = reason(error)
    if differing is not None:
        return (f"the folder has no {TOKENIZER}, {_WITHOUT}: {differing}",)
    for model, name in zip(models, (TOKENIZER, DETOKENIZER), strict=True):
        with saved_graph(model, folder / name) as tree:
            _tidy(tree)
    return ()


def _converted(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Any]:
    import openvino_tokenizers

    models: tuple[Any, Any] = openvino_tokenizers.convert_tokenizer(
        tokenizer, with_detokenizer=True
    )
    return models


def _differing(tokenizer: PreTrainedTokenizerBase, *models: Any) -> str | None:
    """Return in words how the models differ from the tokenizer; None: on none of the texts."""
    theirs = OpenVinoTokenizer(*models)
    text = other_ids(PROBE, tokenizer, theirs.encode)
    if text is not None:
        return f"openvino-tokenizers' form of it gives other tokens for {quoted(text, 40)}"
    with tokenizing():
        for text in PROBE:
            ids = tokenizer(text)["input_ids"]
            if theirs.decode(ids) != tokenizer.decode(ids, skip_special_tokens=True):
                return f"openvino-tokenizers' form of it decodes {quoted(text, 40)} otherwise"
    return None


def _tidy(tree: ElementTree.ElementTree[Any]) -> None:
    """Take out what differs between equal runs: names by their place, and no other program's
    version."""
    for info in tree.findall("./rt_info"):
        for entry in list(info):
            if _OF_THE_MACHINE.fullmatch(entry.tag) or entry.tag == "info":
                info.remove(entry)
    places: dict[str, int] = {}
    for element in tree.iter():
        for key in ("name", "names", "output_names", "variable_id"):
            if key in element.attrib:
                name = _RUNNING.sub(
                    lambda one: f"{one[1]}_{places.setdefault(one[0], len(places))}",
                    element.attrib[key],
                )
                element.set(key, name)


class OpenVinoTokenizer:
    """A tokenizer's two models, at work."""

    def __init__(self, tokenizer: Any, detokenizer: Any) -> None:
        """Both are models or their files."""
        import openvino
        import openvino_tokenizers  # noqa: F401  which adds its operations to every Core

        core = openvino.Core()
        self._tokenizer, self._detokenizer = (
            core.compile_model(model, "CPU") for model in (tokenizer, detokenizer)
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, special tokens around it included."""
        ids: list[int] = self._tokenizer([text])["input_ids"][0].tolist()
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special tokens."""
        return str(self._detokenizer([ids])["string_output"][0])
