"""The files of a LoRA without a model: read, written, found below a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from graft.adapters.lora import LoraAdapter
from graft.adapters.low_rank import LowRank
from graft.adapters.starts.registry import STARTS
from graft.errors import GraftError, raise_problems
from graft.files.bounds import bound
from graft.files.write import new_folder, write_json
from graft.model.adapter_files import (
    OWN_CONFIG,
    OWN_VERSION,
    check_adapter_file,
    read_adapter_tensors,
    read_configs,
)
from graft.model.adapter_names import PEFT_PREFIX
from graft.model.peft_files import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    VARIANTS,
    foreign_tensor,
    lora_config,
    peft_alphas,
    peft_key,
    peft_problems,
    peft_scaling,
    rank_problems,
    split_peft_key,
)
from graft.model.save import save_tensors

_TOLD = 20


@dataclass(frozen=True)
class LoraLayer:
    """One layer's update s (B A x + b)."""

    A: Tensor
    """[rank, in_features]."""
    B: Tensor
    """[out_features, rank]."""
    scaling: float = 1.0
    bias: Tensor | None = None
    """[out_features]."""

    @property
    def rank(self) -> int:
        """The rank of A and B."""
        return len(self.A)

    def update(self) -> LowRank:
        """Return s B A, the scaling in B; float64."""
        return LowRank(self.A.double(), self.B.double() * self.scaling)


@dataclass(frozen=True)
class LoraFiles:
    """A LoRA by layer, and what its folder says beside."""

    layers: Mapping[str, LoraLayer]
    base: str
    """Folder or hub id of the model that it belongs to; empty where nothing says it."""
    init: str = "default"
    """How it started; see `graft.adapters.starts`."""
    transposed: bool = False
    """The base's layers store W as [in_features, out_features] (GPT-2's Conv1D)."""
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters of other modules that take the place of the base's, by name: PEFT's
    modules_to_save, which `graft adopt` reads too."""

    @property
    def parameters(self) -> int:
        """How many numbers the low-rank factors hold."""
        return sum(one.A.numel() + one.B.numel() for one in self.layers.values())


def read_lora(folder: Path) -> LoraFiles:
    """Return the LoRA in a folder that graft or PEFT wrote.

    Raises GraftError when the folder holds none: another kind of adapter, a damaged one, or one
    that trained more than low-rank updates of linear layers.
    """
    own, config = read_configs(folder)
    kind = next((one for one in VARIANTS if config.get(one)), None)
    if not config or kind is not None:
        what = f"it has {kind}" if kind is not None else f"it is of method {own and own.method}"
        raise GraftError(
            f"{folder} is no ordinary LoRA ({what}): its update is no product of two matrices. "
            "Where it can be one, `graft export RUN --to peft` writes it so; `graft adapter "
            "extract BASE RUN` makes one of any run"
        )
    problems = peft_problems(config)
    if own is not None:
        check_adapter_file(folder)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_adapter_tensors(folder).items():
        layer, parameter = split_peft_key(key, LoraAdapter.peft_names)
        if parameter is None:
            problems.append(foreign_tensor(key))
        else:
            parts.setdefault(layer, {})[parameter] = tensor
    alphas, found = peft_alphas(config, parts)
    problems += found
    downs = {layer: part["A"] for layer, part in parts.items() if "A" in part}
    if own is None:
        problems += rank_problems(config, downs)
    layers = {}
    for name, part in parts.items():
        problem = _problem(part)
        if problem is not None:
            problems.append(f"{name}: {problem}")
            continue
        scaling = None if own is None else own.scaling.get(name)
        if scaling is None:
            scaling = peft_scaling(config, alphas[name], len(part["A"]))
        layers[name] = LoraLayer(part["A"], part["B"], scaling, part.get("bias"))
    if not layers and not problems:
        problems.append("it holds no tensors")
    raise_problems(problems[:_TOLD], f"adapter {folder}")
    return LoraFiles(
        layers,
        base=(own.base if own is not None else None)
        or str(config.get("base_model_name_or_path") or ""),
        init="default" if own is None else own.init,
        transposed=bool(config.get("fan_in_fan_out")),
    )


def _problem(part: Mapping[str, Tensor]) -> str | None:
    if not {"A", "B"} <= part.keys():
        return "lora_A or lora_B is missing"
    A, B = part["A"], part["B"]
    if A.ndim != 2 or B.ndim != 2 or not A.numel() or not B.numel() or len(A) != B.shape[1]:
        return f"lora_A is {list(A.shape)} and lora_B {list(B.shape)}, which give no product"
    if len(A) > bound(max(len(B), A.shape[1])):
        return f"its rank is {len(A):,}, above both of its sizes, {len(B):,} and {A.shape[1]:,}"
    if not all(bool(tensor.isfinite().all()) for tensor in part.values()):
        return "it holds what is infinite or no number"
    return None


def write_lora(lora: LoraFiles, folder: Path, beside: Mapping[str, object] | None = None) -> None:
    """Write a LoRA to a new folder that PEFT and graft read, its factors float32.

    beside: values of JSON files that belong into it, by their names. Raises GraftError when the
    folder cannot be written.
    """
    with_bias = any(layer.bias is not None for layer in lora.layers.values())
    tensors: dict[str, Tensor] = {}
    for name, layer in lora.layers.items():
        parts = {"A": layer.A, "B": layer.B}
        if with_bias:
            parts["bias"] = layer.B.new_zeros(len(layer.B)) if layer.bias is None else layer.bias
        for part, tensor in parts.items():
            tensors[peft_key(name, LoraAdapter.peft_names[part])] = tensor.float().contiguous()
    tensors |= {f"{PEFT_PREFIX}{name}": tensor for name, tensor in lora.saved.items()}
    config = lora_config(
        {name: layer.rank for name, layer in lora.layers.items()},
        {name: layer.scaling * layer.rank for name, layer in lora.layers.items()},
        lora.base,
        lora.transposed,
    )
    config["lora_bias"] = with_bias
    if lora.saved:
        config["modules_to_save"] = list(
            dict.fromkeys(name.rpartition(".")[0] for name in lora.saved)
        )
    with new_folder(folder) as part_folder:
        digest = save_tensors(tensors, part_folder / PEFT_WEIGHTS)
        write_json(part_folder / PEFT_CONFIG, config)
        own = {
            "format_version": OWN_VERSION,
            "method": LoraAdapter.method,
            "base": lora.base,
            "scaling": {name: layer.scaling for name, layer in lora.layers.items()},
            "init": lora.init,
            "sha256": digest,
        }
        write_json(part_folder / OWN_CONFIG, own)
        for name, value in (beside or {}).items():
            write_json(part_folder / name, value)


def belongs_to_its_base(lora: LoraFiles) -> bool:
    """Return whether an adapter makes up for its base's rounding, so that no part of it stands
    for the task alone."""
    return STARTS[lora.init].changes_base
