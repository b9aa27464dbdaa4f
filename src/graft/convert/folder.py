"""A Hugging Face folder in whatever quantisation: its settings, its skeleton, its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from graft.convert.config import ConvertConfig
from graft.convert.labels.integer_settings import separate_settings, settings_by_tensors
from graft.convert.source import PlainTensor, Source
from graft.errors import GraftError
from graft.files.read import read_json
from graft.model.folder import parse_config
from graft.model.foreign import check_files
from graft.model.names import names_in
from graft.model.subject import build_skeleton
from graft.model.text_part import TextPart, check_text_only, open_text_part
from graft.model.weight_files import WeightFiles
from graft.model.weight_sets import INDEX_FILE, SINGLE_FILE, other_safetensors, pickled_weights
from graft.text import quoted

WORDS = (torch.int32, torch.uint32)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_SETTINGS = ("quantization_config", "quantization", "compression_config")


@dataclass(frozen=True)
class ForeignFolder:
    """A folder that another tool quantised, with its config.json."""

    folder: Path
    config: dict[str, Any]
    asked: ConvertConfig = ConvertConfig()
    notes: list[str] = field(default_factory=list)
    """What is to be told of its files and settings, in words."""
    _built: dict[int, PreTrainedModel | TextPart] = field(default_factory=dict, repr=False)
    """What was built so far, by the number of tensors: names and modules are asked of the same."""

    @property
    def settings(self) -> dict[str, Any]:
        """What config.json says of the quantisation."""
        return next((self.config[key] for key in _SETTINGS if self.config.get(key)), {})

    @property
    def is_pickled(self) -> bool:
        """Whether it holds pickled weights and no others that are the model's."""
        if (self.folder / INDEX_FILE).is_file() or (self.folder / SINGLE_FILE).is_file():
            return False
        # A variant or an adapter beside them; a quantised model may have a name of its own.
        others = other_safetensors(self.folder) if self.settings else []
        return bool(pickled_weights(self.folder)) and not others

    def skeleton(self, tensors: int = 0) -> PreTrainedModel:
        """Return the modules on the meta device, as they are without the quantisation.

        tensors: how many its files hold; see `build_skeleton`.
        """
        if self.asked.text_part:
            return self._text_part(tensors).text
        self.check_text_only()
        if tensors not in self._built:
            self._built[tensors] = build_skeleton(self._plain_config, tensors=tensors)
        built = self._built[tensors]
        assert isinstance(built, PreTrainedModel)
        return built

    def check_text_only(self) -> None:
        """Raise GraftError for a model that takes more than text, with the way to its text part."""
        check_text_only(self._plain_config, self.folder)

    def names(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the name in the model of each tensor of its files, by its name there.

        Tensors of other parts than the text are left out where that is asked for.
        """
        keys = list(keys)
        if not self.asked.text_part:
            return names_in(self.skeleton(len(keys)), keys)
        part = self._text_part(len(keys))
        names = part.names(keys)
        self.notes.append(
            f"the text part of a {part.whole.config.model_type}, as a "
            f"{part.text.config.model_type}; {len(keys) - len(names)} tensors of its other parts "
            "stay behind"
        )
        return names

    def weights(self) -> WeightFiles:
        """Return the safetensors files under the model's names; raises GraftError for none."""
        files = self.files()
        self.notes.extend(files.notes)
        return files.named(self.names(files))

    def files(self) -> WeightFiles:
        """Return the safetensors files under their own names; raises GraftError for none."""
        standard = (self.folder / INDEX_FILE).is_file() or (self.folder / SINGLE_FILE).is_file()
        others = other_safetensors(self.folder)
        single = others[0] if len(others) == 1 and not standard else None
        return WeightFiles(self.folder, single, narrow=True)

    @cached_property
    def _plain_config(self) -> PreTrainedConfig:
        plain = {key: value for key, value in self.config.items() if key not in _SETTINGS}
        return parse_config(plain, self.folder)

    def _text_part(self, tensors: int) -> TextPart:
        if tensors not in self._built:
            self._built[tensors] = open_text_part(
                self._plain_config, self.config, self.folder, tensors
            )
        built = self._built[tensors]
        assert isinstance(built, TextPart)
        return built


def open_folder(folder: Path, asked: ConvertConfig) -> ForeignFolder:
    """Read config.json; the settings of an older folder are in a file of their own.

    Raises GraftError when either is damaged.
    """
    check_files(folder)
    config = read_json(folder / "config.json")
    for key in _SETTINGS:
        if not isinstance(config.get(key) or {}, dict):
            raise GraftError(
                f"{folder / 'config.json'}: {key} is {quoted(config[key])}; expected settings by "
                "name"
            )
    found = ForeignFolder(folder, config, asked)
    if found.settings or found.is_pickled or not any(folder.glob("*.safetensors")):
        return found
    settings, where = separate_settings(folder)
    note = f"its settings are those of {where}; config.json says nothing of a quantisation"
    if not settings:
        settings = settings_by_tensors(found.files())
        note = "its quantisation is known by its tensors alone; config.json says nothing of one"
    if not settings:
        return found
    return ForeignFolder(folder, config | {"quantization_config": settings}, asked, [note])


def plain_source(folder: ForeignFolder) -> Source:
    """Return what is in a folder of safetensors that is not quantised."""
    files = folder.weights()
    return Source("Transformers", folder.skeleton(len(files)), {}, plain_tensors(files, ()))


def plain_tensors(files: WeightFiles, but: Iterable[str]) -> dict[str, PlainTensor]:
    """Return every tensor of the files but those that are part of a quantised layer."""
    left_out = set(but)
    return {
        name: PlainTensor(files.shape(name), files.dtype(name), partial(files.read_once, name))
        for name in files
        if name not in left_out
    }


def check_parts(
    files: WeightFiles,
    name: str,
    expected: Mapping[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]],
) -> None:
    """Raise GraftError unless the layer's tensors are there, in their shape and one of the dtypes.

    expected: (shape, dtypes) of each part of the layer's name.
    """
    for part, (shape, dtypes) in expected.items():
        check_part(files, f"{name}.{part}", shape, dtypes)


def check_part(
    files: WeightFiles, key: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise GraftError unless the tensor is there, in that shape and one of the dtypes."""
    if key not in files:
        raise GraftError(f"tensor {key} is missing")
    if files.shape(key) != shape or files.dtype(key) not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise GraftError(
            f"{key} is {str(files.dtype(key)).removeprefix('torch.')} "
            f"{list(files.shape(key))}; expected {kinds} {list(shape)}"
        )


def size(files: WeightFiles, key: str, axis: int) -> int:
    """Return a size of a matrix; raises GraftError when it is missing or none."""
    if key not in files:
        raise GraftError(f"tensor {key} is missing")
    shape = files.shape(key)
    if len(shape) != 2 or 0 in shape:
        raise GraftError(f"{key} has shape {list(shape)}; expected a matrix")
    return shape[axis]
