"""From a model folder to a model in memory, each weight read, quantised and dropped in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from graft.adapters.attach import replace_module
from graft.errors import GraftError, raise_problems
from graft.files import read_json
from graft.formats.base import Packed, WeightFormat
from graft.formats.registry import parse_format
from graft.model.devices import resolve_device, resolve_dtype
from graft.model.targets import frozen_linear, linear_layers, linear_shape, select_targets
from graft.model.weight_files import WeightFiles

QUANTISATION_FILE = "graft.json"
_NO_TOKENIZER = (ValueError, KeyError, OSError, ImportError)
FORMAT_VERSION = 1
CONFIG_MARKER = {"packed_by": "graft"}
"""The quantization_config of a quantised folder. Readers without graft must refuse it rather than
start from random weights: transformers ignores a quant_method that it does not know, with a
warning, but raises when there is none."""

CONVERTIBLE = ("gptq", "awq", "bitsandbytes", None)
"""The quant_methods in config.json that graft.convert reads; MLX's has none."""

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


def find_folder(model: str) -> Path:
    """Return the local folder of a model; a hub id is downloaded (weights as safetensors alone).

    Raises GraftError when there is neither such a folder nor such a hub id.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise GraftError(f"{folder} has no config.json: it is no Hugging Face model folder")
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or model.endswith("/"):
        raise GraftError(f"there is no folder {model!r} (and it is no hub id of form owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise GraftError(
            f"there is no folder {model!r}, and the hub has it not or cannot be reached: {error}"
        ) from error


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the model's configuration; raises GraftError when it is damaged or unknown."""
    raw = read_json(folder / "config.json")
    # MLX has the second name, and in newer folders both.
    quantisation = raw.get("quantization_config", raw.get("quantization"))
    if quantisation is not None and quantisation != CONFIG_MARKER:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        bring_in = f"; bring it in with: graft convert {folder} --out NEW_FOLDER"
        raise GraftError(
            f"{folder} is quantised by another tool ({json.dumps(quantisation):.100}); graft "
            "starts from unquantised weights or from a folder in its own format"
            + (bring_in if method in CONVERTIBLE else "")
        )
    if quantisation is not None and not (folder / QUANTISATION_FILE).is_file():
        raise GraftError(f"{folder} is a quantised folder without its {QUANTISATION_FILE}")
    with understood(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # Our marker must not reach transformers, which refuses it.
    if quantisation is not None:
        del config.quantization_config
    return config


def parse_config(raw: Mapping[str, Any], folder: Path) -> PreTrainedConfig:
    """Return the configuration that a config.json of that folder holds; raises as `read_config`."""
    with understood(folder / "config.json"):
        return CONFIG_MAPPING[str(raw.get("model_type"))].from_dict(dict(raw))


@contextmanager
def understood(file: Path) -> Iterator[None]:
    """Raise GraftError for what transformers raises on a configuration that makes no model."""
    try:
        yield
    except (
        ValueError,
        KeyError,
        TypeError,
        ArithmeticError,
        OSError,
        StrictDataclassError,
    ) as error:
        raise GraftError(f"{file} is not understood: {error}") from error


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; raises GraftError when the folder has none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        # For a damaged tokenizer.json the library raises Exception itself, and no kind of it.
        if type(error) is not Exception and not isinstance(error, _NO_TOKENIZER):
            raise
        raise GraftError(f"{folder} has no tokenizer that can be loaded: {error}") from error


def build_skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model's modules on the meta device: shapes and names without data."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError) as error:
        raise GraftError(f"this is no causal language model that can be built: {error}") from error
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def load_model(
    model: str,
    *,
    weight_format: WeightFormat | Mapping[str, WeightFormat] | None = None,
    targets: Sequence[str] = (),
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    pack: PackLayer | None = None,
    on_tensor: OnTensor | None = None,
) -> LoadedModel:
    """Load a model folder or hub id, quantising the target layers while they are read.

    The peak is the quantised model plus its largest tensor and what rounding that takes. `pack`
    rounds a layer's weight (default: the format's own `pack`, to nearest). A folder that
    graft quantised is memory-mapped as it is, and then weight_format must be None. With no
    weight_format every layer stays as it is. Nothing in the result requires a gradient.

    Raises GraftError with everything that does not fit, before any weight is read.
    """
    folder = find_folder(model)
    config = read_config(folder, trust_remote_code)
    target_device = resolve_device(device)
    generation_config = read_generation_config(folder)
    tokenizer = read_tokenizer(folder, trust_remote_code)
    with WeightFiles(folder) as files:
        source_dtype = _source_dtype(folder, files)
        compute_dtype = resolve_dtype(dtype, source_dtype, target_device)
        config.dtype = compute_dtype  # of the buffers that are computed, not read
        skeleton = build_skeleton(config, trust_remote_code)
        stored = formats = _stored_formats(folder, skeleton)
        if weight_format is not None:
            if stored:
                raise GraftError(
                    f"{folder} is quantised already; load it as it is or start from its base"
                )
            if isinstance(weight_format, Mapping):
                formats = dict(weight_format)
            else:
                formats = dict.fromkeys(select_targets(skeleton, targets), weight_format)
        pack = pack or (lambda _, weight, chosen: chosen.pack(weight))
        loader = _Loader(skeleton, files, formats, bool(stored), compute_dtype, target_device, pack)
        loader.run(on_tensor)
    if generation_config is not None:
        skeleton.generation_config = generation_config
    skeleton.requires_grad_(False)
    return LoadedModel(skeleton, tokenizer, folder, source_dtype, compute_dtype)


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Return the defaults of generation, where the folder has any."""
    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_dict(read_json(folder / "generation_config.json"))


def _stored_formats(folder: Path, model: PreTrainedModel) -> dict[str, WeightFormat]:
    """Return the formats of the layers of a folder that graft quantised; empty for any other."""
    file = folder / QUANTISATION_FILE
    if not file.is_file():
        return {}
    description = read_json(file)
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise GraftError(
            f"{file} has format_version {version!r}; this version of graft reads {FORMAT_VERSION}: "
            "update graft, or quantise again"
        )
    layers = description.get("layers")
    if not isinstance(layers, dict):
        raise GraftError(f"{file} names no layers; quantise again")
    known, formats, problems = linear_layers(model), {}, []
    for name, layer in layers.items():
        if name not in known:
            problems.append(f"{name} is no linear layer of this model")
        elif not isinstance(layer, dict) or not isinstance(layer.get("format"), str):
            problems.append(f"{name} names no format")
        else:
            try:
                formats[name] = parse_format(layer)
            except GraftError as error:
                problems.append(f"{name}: {error}")
    raise_problems(problems[:20], f"{file}, which may be from another version of graft")
    return formats


def _source_dtype(folder: Path, files: WeightFiles) -> torch.dtype:
    if (folder / QUANTISATION_FILE).is_file():
        name = str(read_json(folder / QUANTISATION_FILE).get("source_dtype"))
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)
    return files.source_dtype()


class _Loader:
    """Fills a skeleton on the meta device from weight files, one tensor at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        files: WeightFiles,
        formats: dict[str, WeightFormat],
        stored: bool,
        dtype: torch.dtype,
        device: torch.device,
        pack: PackLayer,
    ) -> None:
        self.model, self.files, self.formats, self.pack = model, files, formats, pack
        self.stored, self.dtype, self.device = stored, dtype, device
        self.tied = set(model.all_tied_weights_keys)

    def run(self, on_tensor: OnTensor | None) -> None:
        plan = self._plan()
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
        self._initialise_buffers()
        self.model.tie_weights()
        left = [name for name, tensor in self.model.state_dict().items() if tensor.is_meta]
        raise_problems([f"{name} was not loaded" for name in left], str(self.files.folder))

    def _plan(self) -> dict[str, str]:
        """Return {layer or tensor name: key in the files}; raises with every misfit."""
        plan, problems = {}, []
        inside = {f"{layer}.weight": layer for layer in self.formats}
        for name, tensor in self.model.state_dict().items():
            if name in inside and self.stored:
                problems += self._check_packed(inside[name])
                plan[inside[name]] = inside[name]
                continue
            key = self._key(name)
            if key is None:
                if name not in self.tied:
                    problems.append(f"tensor {name} is missing")
            elif self.files.shape(key) != tuple(tensor.shape):
                problems.append(
                    f"{key} has shape {list(self.files.shape(key))}; config.json makes it "
                    f"{list(tensor.shape)}"
                )
            elif name in inside:
                plan[inside[name]] = key
            elif name.removesuffix(".bias") not in self.formats:
                plan[name] = key
        raise_problems(problems[:20], f"the weights in {self.files.folder} do not fit config.json")
        return plan

    def _key(self, name: str) -> str | None:
        """Return the key that the files have for a tensor: with or without the model's prefix."""
        prefix = self.model.base_model_prefix + "."
        for key in (name, name.removeprefix(prefix), prefix + name):
            if key in self.files:
                return key
        return None

    def _check_packed(self, layer: str) -> list[str]:
        in_features, out_features, _ = linear_shape(self.model.get_submodule(layer))
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
        in_features, out_features, _ = linear_shape(self.model.get_submodule(layer))
        specs = self.formats[layer].storage(out_features, in_features)
        return {name: spec.empty(self.device) for name, spec in specs.items()}

    def _load_layer(self, layer: str, room: dict[str, torch.Tensor]) -> None:
        module = self.model.get_submodule(layer)
        in_features, out_features, transposed = linear_shape(module)
        weight_format = self.formats[layer]
        if self.stored:
            names = weight_format.storage(out_features, in_features)
            read = {name: self.files.read(f"{layer}.{name}") for name in names}
            packed = {name: tensor.to(self.device) for name, tensor in read.items()}
        else:
            key = self._key(f"{layer}.weight")
            assert key is not None
            weight = self.files.read_once(key).to(self.device)
            try:
                weight = weight.T.contiguous() if transposed else weight
                rounded = self.pack(layer, weight, weight_format)
            except GraftError as error:
                raise GraftError(f"{layer}: {error}") from error
            packed = {name: room[name].copy_(tensor) for name, tensor in rounded.items()}
        bias_key = self._key(f"{layer}.bias")
        bias = None
        if isinstance(module.bias, nn.Parameter) and bias_key is not None:
            bias = self.files.read(bias_key).to(self.device, self.dtype)
        frozen = frozen_linear(module, weight_format, packed, bias)
        replace_module(self.model, layer, frozen)

    def _assign(self, name: str, tensor: torch.Tensor) -> None:
        parent_name, _, child = name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        value: Any = tensor.to(self.device, dtype)
        if isinstance(parent._parameters.get(child), nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        setattr(parent, child, value)

    def _initialise_buffers(self) -> None:
        """Compute the buffers that no file holds (rotary frequencies), as transformers does."""
        for module in self.model.modules():
            missing = {name: b for name, b in module.named_buffers(recurse=False) if b.is_meta}
            if not missing:
                continue
            # transformers draws every tensor of a module anew. Those that are loaded already
            # (Gemma's scaled embedding has both kinds) wait aside meanwhile.
            aside: list[tuple[dict[str, Any], str, Any]] = []
            kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in kinds:
                for name, tensor in tensors.items():
                    if tensor is not None and name not in missing:
                        aside.append((tensors, name, tensor))
                        tensors[name] = torch.empty_like(tensor, device="meta")
            for name, buffer in missing.items():
                setattr(module, name, torch.empty_like(buffer, device=self.device))
            self.model._init_weights(module)
            for tensors, name, tensor in aside:
                tensors[name] = tensor
