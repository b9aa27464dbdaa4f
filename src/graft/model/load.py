"""From a model folder to a model in memory, each weight read, quantised and dropped in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graft.adapters.attach import replace_module
from graft.errors import GraftError, raise_problems
from graft.formats.base import Packed, WeightFormat
from graft.layers.registry import kind_of
from graft.model.buffers import initialise_buffers
from graft.model.conversions import check_names
from graft.model.devices import resolve_device, resolve_dtype
from graft.model.folder import read_generation_config, without_padding_beyond
from graft.model.narrow import keep_narrow
from graft.model.subject import Subject, open_subject
from graft.model.targets import linear_shape, select_targets

OnTensor = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""
PackLayer = Callable[[str, torch.Tensor, WeightFormat], Packed]
"""Rounds the weight [out_features, in_features] of the named layer to a format."""


@dataclass
class LoadedModel:
    """A model in memory, its tokenizer, and what is known of where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    source_dtype: torch.dtype
    dtype: torch.dtype
    """The dtype it computes in."""
    notes: tuple[str, ...] = ()
    """What is to be told of the folder's weights, in words."""


def load_model(
    model: str | Path | Subject,
    *,
    weight_format: WeightFormat | Mapping[str, WeightFormat] | None = None,
    targets: Sequence[str] = (),
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    pack: PackLayer | None = None,
    on_tensor: OnTensor | None = None,
    trains_whole: bool = False,
) -> LoadedModel:
    """Load a model folder, hub id or subject, quantising the target layers while they are read.

    The peak is the quantised model plus its largest tensor and what rounding that takes. `pack`
    rounds a layer's weight (default: the format's own `pack`, to nearest). A folder that
    graft quantised is memory-mapped as it is, and then weight_format must be None. With no
    weight_format every layer stays as it is. Nothing in the result requires a gradient. dtype: see
    `resolve_dtype`; 'stored' leaves every tensor as it is in the files. trains_whole: embedding and
    head will train, so they have the dtype of the computation whatever `keep_narrow` says.

    Raises GraftError with everything that does not fit, before any weight is read.
    """
    subject = open_subject(model, trust_remote_code)
    folder, tokenizer = subject.folder, subject.tokenizer
    target_device = resolve_device(device)
    generation_config = read_generation_config(subject.tokenizer_folder or folder)
    with subject.weight_files:
        compute_dtype = resolve_dtype(dtype, subject.source_dtype, target_device)
        built = subject.new_model(compute_dtype)
        formats = dict(subject.formats)
        stored = bool(formats)
        if weight_format is not None:
            if stored:
                raise GraftError(
                    f"{folder} is quantised already; load it as it is or start from its base"
                )
            if isinstance(weight_format, Mapping):
                formats = dict(weight_format)
            else:
                formats = dict.fromkeys(select_targets(built, targets), weight_format)
        pack = pack or (lambda _, weight, chosen: chosen.pack(weight))
        kept = None if dtype == "stored" else compute_dtype
        build = partial(subject.built_buffers, compute_dtype)
        loader = _Loader(built, subject, formats, stored, (kept, target_device), pack, build)
        if kept is not None and not trains_whole:
            keep_narrow(built, kept, target_device, loader.stored_dtype)
        loader.run(on_tensor)
    if generation_config is not None:
        without_padding_beyond(generation_config, getattr(built.config, "vocab_size", None))
        built.generation_config = generation_config
        if subject.tokenizer_folder is not None:  # whose texts end elsewhere
            built.config.eos_token_id = generation_config.eos_token_id
    built.requires_grad_(False)
    return LoadedModel(built, tokenizer, folder, subject.source_dtype, compute_dtype, subject.notes)


class _Loader:
    """Fills a skeleton on the meta device from weight files, one tensor at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        subject: Subject,
        formats: dict[str, WeightFormat],
        stored: bool,
        place: tuple[torch.dtype | None, torch.device],
        pack: PackLayer,
        build: Callable[[], Mapping[str, torch.Tensor]],
    ) -> None:
        """place: what floats become (None: nothing else), and where."""
        self.model, self.formats, self.pack = model, formats, pack
        self.subject, self.files = subject, subject.tensors
        self.stored, self.build = stored, build
        self.dtype, self.device = place

    def run(self, on_tensor: OnTensor | None) -> None:
        plan = self._plan()
        self.subject.left_out  # noqa: B018  (raises where a tensor more changes the model)
        initialise_buffers(self.model, self.device, self.build)
        # All room is taken first: lasting tensors that are allocated between the temporaries of the
        # rounding would scatter over the heap and leave holes that nothing fits in.
        room = {} if self.stored else {layer: self._room(layer) for layer in self.formats}
        for done, (name, key) in enumerate(plan.items(), start=1):
            if name in self.formats:
                self._load_layer(name, room.pop(name, {}))
            else:
                tensor = self.files.read(key)
                self._assign(name, tensor)
            if on_tensor is not None:
                on_tensor(done, len(plan))
        self.model.tie_weights()
        left = [name for name, tensor in self.model.state_dict().items() if tensor.is_meta]
        raise_problems([f"{name} was not loaded" for name in left], str(self.files.folder))

    def _plan(self) -> dict[str, str]:
        """Return {layer or tensor name: key in the files}; raises with every misfit."""
        plan: dict[str, str] = {}
        missing, problems = [], []
        inside = {self._weight_name(layer): layer for layer in self.formats}
        tied = self.model.all_tied_weights_keys
        for name, tensor in self.model.state_dict().items():
            if name in tied:
                continue  # it becomes the very tensor that it is tied to
            if name in inside and self.stored:
                problems += self._check_packed(inside[name])
                plan[inside[name]] = inside[name]
                continue
            key = self._key(name)
            if key is None:
                missing.append(name)
            elif self.files.shape(key) != tuple(tensor.shape):
                problems.append(
                    f"{key} has shape {list(self.files.shape(key))}; config.json makes it "
                    f"{list(tensor.shape)}"
                )
            elif self.files.dtype(key).is_floating_point != tensor.is_floating_point():
                problems.append(f"{key} holds {self.files.dtype(key)}; expected {tensor.dtype}")
            elif name in inside:
                plan[inside[name]] = key
            elif name.removesuffix(".bias") not in self.formats:
                plan[name] = key
        check_names(self.model, missing, self.files, self.files.folder)
        lost = [f"tensor {name} is missing" + self._placed(name) for name in missing]
        problems = [*lost, *problems]
        raise_problems(problems[:20], f"the weights in {self.files.folder} do not fit config.json")
        return plan

    def _key(self, name: str) -> str | None:
        """Return what the files call a tensor: its name, or that of another that is the same."""
        same = (name, *self.subject.partners.get(name, ()))
        return next((key for key in same if key in self.files), None)

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype that the files have for an unquantised tensor, None for another."""
        key = self._key(name)
        inside = name.rpartition(".")[0] in self.formats
        return None if key is None or inside else self.files.dtype(key)

    def _placed(self, name: str) -> str:
        """Return in words where the folder's index has a tensor that is in no file."""
        place = self.files.place(name)
        return f"; the index has it in {place}: download that again" if place else ""

    def _weight_name(self, layer: str) -> str:
        return f"{layer}.{kind_of(self.model.get_submodule(layer)).weight}"

    def _check_packed(self, layer: str) -> list[str]:
        in_features, out_features = linear_shape(self.model.get_submodule(layer))
        problems = []
        for name, spec in self.formats[layer].storage(out_features, in_features).items():
            key = f"{layer}.{name}"
            if key not in self.files:
                problems.append(f"tensor {key} is missing")
            elif (self.files.shape(key), self.files.dtype(key)) != (spec.shape, spec.dtype):
                problems.append(
                    f"{key} is {self.files.dtype(key)} {list(self.files.shape(key))}; its format "
                    f"makes it {spec.dtype} {list(spec.shape)}"
                )
        return problems

    def _room(self, layer: str) -> dict[str, torch.Tensor]:
        in_features, out_features = linear_shape(self.model.get_submodule(layer))
        specs = self.formats[layer].storage(out_features, in_features)
        return {name: spec.empty(self.device) for name, spec in specs.items()}

    def _load_layer(self, layer: str, room: dict[str, torch.Tensor]) -> None:
        module = self.model.get_submodule(layer)
        kind = kind_of(module)
        weight_format = self.formats[layer]
        if self.stored:
            in_features, out_features = kind.shape(module)
            names = weight_format.storage(out_features, in_features)
            read = {name: self.files.read(f"{layer}.{name}") for name in names}
            packed = {name: tensor.to(self.device) for name, tensor in read.items()}
        else:
            key = self._key(self._weight_name(layer))
            assert key is not None
            weight = self.files.read_once(key).to(self.device)
            try:
                weight = kind.rows(module, weight).contiguous()
                rounded = self.pack(layer, weight, weight_format)
            except GraftError as error:
                raise GraftError(f"{layer}: {error}") from error
            packed = {name: room[name].copy_(tensor) for name, tensor in rounded.items()}
        bias_key = self._key(f"{layer}.bias")
        bias = None
        if kind.bias(module) is not None and bias_key is not None:
            bias = self.files.read(bias_key).to(self.device, self.dtype)
        replace_module(self.model, layer, kind.frozen(module, weight_format, packed, bias))

    def _assign(self, name: str, tensor: torch.Tensor) -> None:
        parent_name, _, child = name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        place = getattr(parent, child)
        keeps = self.dtype is None or not tensor.is_floating_point()
        dtype = tensor.dtype if keeps else place.dtype
        value: Any = tensor.to(self.device, dtype)
        if isinstance(place, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        setattr(parent, child, value)
