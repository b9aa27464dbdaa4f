"""Which tool wrote a model, from its files."""

from __future__ import annotations

import json
from pathlib import Path

from graft.convert.config import ConvertConfig
from graft.convert.experts import with_experts
from graft.convert.folder import ForeignFolder, open_folder, plain_source
from graft.convert.labels.settings import unnamed
from graft.convert.labels.unread import unread_tool
from graft.convert.registry import READERS
from graft.convert.source import Source
from graft.errors import GraftError
from graft.model.adapter_extras import head_name
from graft.model.folder import QUANTISATION_FILE, find_folder
from graft.model.targets import linear_layers
from graft.text import listed


def open_source(path: str, asked: ConvertConfig) -> tuple[Source, Path]:
    """Return what is there, and the folder of its tokenizer, for whatever kind it turns out to be.

    path: a folder, a hub id, a .gguf file, or a pickled file beside its config.json. Raises
    GraftError when it is none of the kinds that graft reads, or graft's own already.
    """
    file = Path(path)
    for reader in READERS.values():
        if reader.reads_file(file):
            return reader.open_file(file, asked)
    if file.is_file():
        raise GraftError(f"{path} is no folder, .gguf file or PyTorch file; {_what_is_read()}")
    if (file / "adapter_config.json").is_file() and not (file / "config.json").is_file():
        raise GraftError(
            f"{path} is an adapter and no model; make a run of it and of its base with: "
            f"graft adopt {path} --out RUN"
        )
    folder = find_folder(path)
    if (folder / QUANTISATION_FILE).is_file():
        raise GraftError(f"{folder} is in graft's own format already; use it as it is")
    found = open_folder(folder, asked)
    for reader in READERS.values():
        if reader.reads_folder(found):
            source = _told(with_experts(reader.open_folder(found)), found)
            _tell_label(found, source)
            return source, folder
    tool = unread_tool(found)
    if tool:
        raise GraftError(
            f"{folder} is quantised by {tool}, which graft does not read; start from the "
            "unquantised model, or dequantise it with its own tool and save that"
        )
    if found.settings:
        raise GraftError(
            f"{folder} is quantised by another tool ({json.dumps(found.settings):.100}); "
            f"{_what_is_read()}: start from the unquantised model"
        )
    if not any(folder.glob("*.safetensors")):
        raise GraftError(f"{folder} holds no weights; {_what_is_read()}")
    if asked.text_part:
        return _told(plain_source(found), found), folder
    found.check_text_only()
    raise GraftError(
        f"{folder} holds nothing to convert: its weights are not quantised, and graft takes "
        "them as they are (graft train --model, graft quantize --model)"
    )


def _tell_label(folder: ForeignFolder, source: Source) -> None:
    """Note where the configuration says 'quantised', and no weight is, or not every layer's.

    Whoever dequantises a checkpoint often leaves that in config.json.
    """
    plain = not any(tensor.quantisation for tensor in source.tensors.values())
    if folder.settings and plain and not source.layers and not source.dequantised:
        named = folder.settings.get("quant_method", "quantised")
        source.notes.append(
            f"config.json says {named}, and no tensor is quantised: the weights are as they are"
        )
    elif folder.settings and source.layers:
        layers = [*linear_layers(source.model)]
        if "config_groups" in folder.settings:  # whose 'Linear' is the output head too
            layers.append(head_name(source.model))
        rest = unnamed(folder, [name for name in layers if name not in source.layers])
        if rest:
            source.notes.append(
                f"{len(rest)} linear layers are not quantised, which the settings do not say: they "
                f"are taken as they are ({listed(rest, 3)})"
            )


def _told(source: Source, found: ForeignFolder) -> Source:
    source.notes[:0] = found.notes
    return source


def _what_is_read() -> str:
    *others, last = map(READERS.summary, READERS)
    return f"graft reads {', '.join(others)} and {last}"
