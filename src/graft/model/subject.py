"""A model folder that is opened once and handed down."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from graft.formats.base import WeightFormat
from graft.model.causal import check_attention, check_config
from graft.model.factors import build_factors
from graft.model.families import Family, family_of
from graft.model.folder import (
    QUANTISATION_FILE,
    find_folder,
    read_config,
    read_quantisation,
    read_tokenizer,
    stored_formats,
    without_padding_beyond,
)
from graft.model.foreign import NothingDrawn, modules_within, parameters_on_meta
from graft.model.internals import stays_float32
from graft.model.names import (
    check_unplaced,
    left_note,
    parted,
    parted_note,
    partners,
    under_own_names,
)
from graft.model.targets import kept_layers, linear_layers, linear_shape
from graft.model.text_part import check_text_only
from graft.model.weight_files import WeightFiles
from graft.model.weight_sets import whole_set
from graft.understood import understood

_MARK = torch.float16
"""The dtype that a skeleton is built in. What has it then has the model's dtype: no module asks for
it by name, as rotary frequencies ask for float32."""


_META = torch.device("meta")


@dataclass(frozen=True)
class Subject:
    """A model folder with its configuration; all else of it is read when it is first asked for.

    Everybody shares what it holds, so nobody changes it: `new_model` gives modules to change.
    """

    folder: Path
    stated: PreTrainedConfig
    """What config.json says."""
    trust_remote_code: bool = False
    config_alone: bool = False
    """The folder may hold config.json and nothing else."""
    ties_as_stated: bool = False
    """Tensors that config.json ties stay so, whatever the files hold: earlier versions of graft
    did that, and trained on it."""

    tokenizer_folder: Path | None = None
    """Where its tokenizer lies, with the defaults of generation; None: beside the weights."""
    padding: int | None = None
    """What config.json gave as pad_token_id, where that is beyond the embeddings; `stated` has
    none then."""

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration, which ties nothing that the files hold as two tensors."""
        if not self.parted:
            return self.stated
        config = copy.deepcopy(self.stated)
        config.tie_word_embeddings = False
        return config

    @cached_property
    def parted(self) -> list[str]:
        """The tensors that config.json ties to others, and the files hold as others: a trained head
        in a folder that was saved with the settings of its base."""
        if self.ties_as_stated or not self._as_stated[0].all_tied_weights_keys:
            return []
        if self.config_alone and not whole_set(self.folder):
            return []
        files = under_own_names(self._as_stated[0], self.weight_files)
        return parted(self._as_stated[0], set(files), files.equal)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises GraftError when the folder has none."""
        folder = self.tokenizer_folder or self.folder
        return read_tokenizer(folder, self.trust_remote_code, self.stated)

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model's modules on the meta device: shapes and names without data.

        Raises GraftError when this is no causal language model.
        """
        return self._built[0]

    @cached_property
    def formats(self) -> dict[str, WeightFormat]:
        """The formats of the layers that graft has quantised, by name; empty for a dense model.

        Raises GraftError when graft.json does not belong to this model.
        """
        if not (self.folder / QUANTISATION_FILE).is_file():
            return {}
        model = self.skeleton
        return stored_formats(self.folder, {*linear_layers(model), *kept_layers(model)})

    @cached_property
    def factors(self) -> dict[str, Any]:
        """The ranks of the layers that are low-rank factors in the folder, by name."""
        if not (self.folder / QUANTISATION_FILE).is_file():
            return {}
        return dict(read_quantisation(self.folder).factors or {})

    @cached_property
    def weight_files(self) -> WeightFiles:
        """The tensors of the folder; raises GraftError when there are none that can be read."""
        return WeightFiles(self.folder)

    @cached_property
    def tensors(self) -> WeightFiles:
        """The tensors of the folder under the model's names; raises GraftError as `weight_files`,
        and where two that are different have one place."""
        return under_own_names(self.skeleton, self.weight_files)

    @cached_property
    def left_out(self) -> list[str]:
        """The tensors without a place in the model, all of which it does without.

        Raises GraftError for those that would change what it computes.
        """
        known = set(self.skeleton.state_dict())
        for name, weight_format in self.formats.items():
            in_features, out_features = linear_shape(self.skeleton.get_submodule(name))
            known.discard(f"{name}.weight")
            known |= {f"{name}.{key}" for key in weight_format.storage(out_features, in_features)}
        files = self.tensors
        left = {name: partial(files.read_once, name) for name in files if name not in known}
        return check_unplaced(self.skeleton, left)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be told of the folder's weights, in words; raises as `left_out`."""
        return (
            *self.weight_files.notes,
            *([parted_note(self.parted)] if self.parted else []),
            *([left_note(self.left_out)] if self.left_out else []),
            *([_padding_note(self.padding, self.stated)] if self.padding is not None else []),
        )

    @cached_property
    def partners(self) -> dict[str, list[str]]:
        """For each tensor that config.json ties, the names of all that are the same one."""
        return partners(self._as_stated[0])

    @cached_property
    def source_dtype(self) -> torch.dtype:
        """The dtype of the weights: what most of them have in the files, before graft packed them.

        With the configuration alone it is what that says, float32 when it says nothing.
        """
        if (self.folder / QUANTISATION_FILE).is_file():
            name = read_quantisation(self.folder).source_dtype
            halves = {"bfloat16": torch.bfloat16, "float16": torch.float16}
            return halves.get(str(name), torch.float32)
        if not self.config_alone:
            return self.weight_files.source_dtype()
        return self.stated.dtype if isinstance(self.stated.dtype, torch.dtype) else torch.float32

    @property
    def position_limit(self) -> int | None:
        """The longest text in tokens, where the configuration has a limit."""
        limit: int | None = getattr(self.stated, "max_position_embeddings", None)
        return limit

    @property
    def hidden_size(self) -> int:
        """Features between two decoder layers."""
        return int(self.stated.get_text_config().hidden_size)

    @property
    def family(self) -> Family:
        """What is known of the model's family."""
        return family_of(self.stated)

    def new_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Return a copy of the skeleton to change, as it is built to compute in `dtype`.

        None leaves the dtype that the configuration says.
        """
        skeleton, typed = self._built
        model = copy.deepcopy(skeleton)
        if dtype is not None:
            _set_dtype(model, typed, dtype)
        return model

    def built_buffers(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the buffers of the model as its code builds it in `dtype`, on the CPU.

        Parameters take no memory meanwhile, though each is allocated for a moment.
        """
        config = copy.deepcopy(self.config)
        config.dtype = dtype
        with parameters_on_meta():
            model = build_skeleton(
                config, self.trust_remote_code, len(self.weight_files), torch.device("cpu")
            )
        return dict(model.named_buffers(remove_duplicate=False))

    @cached_property
    def _built(self) -> tuple[PreTrainedModel, frozenset[str]]:
        """The skeleton, and the names of its tensors that have the dtype of the model."""
        return self._build(self.config) if self.parted else self._as_stated

    @cached_property
    def _as_stated(self) -> tuple[PreTrainedModel, frozenset[str]]:
        """The same of config.json as it is."""
        return self._build(self.stated)

    def _build(self, config: PreTrainedConfig) -> tuple[PreTrainedModel, frozenset[str]]:
        marked = copy.deepcopy(config)
        marked.dtype = _MARK
        tensors = 0 if self.config_alone else len(self.weight_files)
        model = build_skeleton(marked, self.trust_remote_code, tensors)
        if self.factors:
            build_factors(model, self.factors, str(self.folder / QUANTISATION_FILE))
        typed = frozenset(name for name, tensor in _tensors(model) if tensor.dtype == _MARK)
        _set_dtype(model, typed, config.dtype if isinstance(config.dtype, torch.dtype) else None)
        return model, typed


def open_subject(
    model: str | Path | Subject,
    trust_remote_code: bool = False,
    config_alone: bool = False,
    ties_as_stated: bool = False,
    tokenizer_folder: Path | None = None,
) -> Subject:
    """Open a model folder or hub id; a subject that is open already is returned as it is.

    With `config_alone` a hub id's config.json is fetched and nothing else; see `Subject` for
    `ties_as_stated` and `tokenizer_folder`. Raises GraftError when there is no such model, or when
    its configuration is damaged or unknown.
    """
    if isinstance(model, Subject):
        return model
    folder = find_folder(str(model), config_alone)
    config = read_config(folder, trust_remote_code)
    check_text_only(config, folder)
    padding = without_padding_beyond(config, getattr(config, "vocab_size", None))
    return Subject(
        folder, config, trust_remote_code, config_alone, ties_as_stated, tokenizer_folder, padding
    )


def _padding_note(padding: int, config: PreTrainedConfig) -> str:
    return (
        f"pad_token_id of config.json, {padding}, is left out: the model has "
        f"{config.vocab_size} embeddings"
    )


def build_skeleton(
    config: PreTrainedConfig,
    trust_remote_code: bool = False,
    tensors: int = 0,
    device: torch.device = _META,
) -> PreTrainedModel:
    """Return the modules of a configuration on the meta device: shapes and names without data.

    tensors: how many the folder's files hold, which bounds how many modules may be built. Raises
    GraftError when it makes no causal language model, or one of more modules.
    """
    check_config(config)
    with (
        understood("config.json", "makes no causal language model that can be built"),
        modules_within(tensors),
        device,
        NothingDrawn(),
    ):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    assert isinstance(model, PreTrainedModel)
    check_attention(model)
    return model.eval()


def _tensors(model: PreTrainedModel) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _set_dtype(model: PreTrainedModel, names: frozenset[str], dtype: torch.dtype | None) -> None:
    """Give the named tensors, and the configuration, the dtype of the model."""
    for config in (model.config, *_parts(model.config)):
        config.dtype = dtype

    def of(name: str) -> torch.dtype:
        kept = dtype is None or stays_float32(model, name, dtype)
        return torch.float32 if kept or dtype is None else dtype

    for name, parameter in model.named_parameters():
        if name in names:
            parameter.data = parameter.data.to(of(name))
    for name, buffer in list(model.named_buffers()):
        if name in names:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, buffer.to(of(name)))


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return the configurations inside that of a model of several parts."""
    found = (getattr(config, key) for key in config.sub_configs)
    return [part for part in found if part is not None]
