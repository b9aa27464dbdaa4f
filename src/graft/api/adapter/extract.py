"""An adapter made of a tuned model: the low-rank difference of its weights from the base's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.attach import adapted_layers, frozen_layers
from graft.adapters.low_rank import left_of, spectrum
from graft.api.adapter.files import ADAPTER_REPORT, Cut, CutLayer, curve, cut_layer
from graft.api.adapter.plots import plot_curve
from graft.api.events import Events
from graft.api.run.folder import load_any
from graft.errors import GraftError, raise_problems
from graft.files.write import check_new, staged
from graft.layers.frozen import FrozenLinear
from graft.layers.registry import kind_of
from graft.model.hub import base_name
from graft.model.lora_files import LoraFiles, LoraLayer, write_lora
from graft.model.targets import linear_layers

Rest = Literal["keep", "drop"]
CURVE_PICTURE = "rank-sweep.png"


@dataclass(frozen=True)
class ExtractReport:
    """What an extracted adapter holds of the difference of two models."""

    base: str
    tuned: str
    rank: int | None
    energy: float | None
    layers: Mapping[str, CutLayer]
    """The linear layers that differ."""
    relative_error: float
    """Over all of these: the norm of what was cut off over that of the difference."""
    parameters: int
    """Of the low-rank factors."""
    rest: Mapping[str, float]
    """Parameters that differ and are no weight or bias of a linear layer, each with its share of
    the squared difference of the whole models."""
    rest_kept: bool
    """They are in the adapter, as PEFT's modules_to_save."""
    rest_parameters: int
    curve: list[dict[str, float | int | None]]
    """The relative error by rank and by energy; see `graft.api.adapter.files.curve`."""


def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    rest: Rest = "keep",
    trust_remote_code: bool = False,
    events: Events | None = None,
) -> ExtractReport:
    """Write the folder `out`: a LoRA for `base` that comes as near to `tuned` as its rank lets it.

    Of each linear layer, W_tuned - W_base = U S Vᵀ is cut to `rank`, or to the smallest rank that
    holds `energy` of Σ S²; all ranks together give it back. Both models are whatever `load` takes:
    a run with any adapter is the weights that it computes with. What else differs (norms,
    embeddings, the head) goes along whole as PEFT's modules_to_save, or with rest='drop' is left
    out; a layer's bias is in the LoRA. Beside the adapter lie adapter-report.json, with the error
    at every rank, and its picture. Raises GraftError, with all that hinders, when the two are not
    of one architecture, when nothing differs, or when `out` exists.
    """
    events, cut, target = events or Events(), Cut(rank, energy), Path(out)
    check_new(target)
    first = load_any(base, "stored", "cpu", trust_remote_code=trust_remote_code)
    second = load_any(tuned, "stored", "cpu", trust_remote_code=trust_remote_code)
    one, other = _Weights(first.model), _Weights(second.model)
    _check_alike(one, other, f"{base} and {tuned} are not of one architecture")
    layers: dict[str, LoraLayer] = {}
    spectra: dict[str, Tensor] = {}
    squares: dict[str, float] = {}
    for done, name in enumerate(one.layers, start=1):
        found = spectrum(other.weight(name) - one.weight(name))
        moved = _bias_move(one.bias(name), other.bias(name))
        if found.rank:
            spectra[name] = found.S
        if found.rank or moved is not None:
            A, B = found.cut(max(cut.of(found.S), 1)) if found.rank else one.nothing(name)
            layers[name] = LoraLayer(A.float(), B.float(), 1.0, moved)
            squares[name] = float(found.S.square().sum())
        events.progress("taking layers apart", done, len(one.layers))
    differing = _rest(one, other)
    if not layers and not differing:
        raise GraftError(f"{tuned} has the weights of {base}: there is nothing to extract")
    if not layers:
        raise GraftError(
            f"{tuned} differs from {base} in no linear layer, only in {', '.join([*differing][:5])}"
        )
    kept = _kept(differing, one, other, str(tuned)) if rest == "keep" else {}
    total = sum(squares.values()) + sum(differing.values())
    report = ExtractReport(
        base=base_name(str(base)),
        tuned=base_name(str(tuned)),
        rank=rank,
        energy=energy,
        layers={name: cut_layer(values, layers[name].rank) for name, values in spectra.items()},
        relative_error=left_of(spectra.values(), [layers[name].rank for name in spectra]),
        parameters=sum(layer.A.numel() + layer.B.numel() for layer in layers.values()),
        rest={name: square / total for name, square in differing.items()},
        rest_kept=bool(kept),
        rest_parameters=sum(tensor.numel() for tensor in kept.values()),
        curve=curve(spectra, {name: sum(one.shape(name)) for name in spectra}),
    )
    lora = LoraFiles(layers, base_name(str(base)), transposed=one.transposed, saved=kept)
    with staged(target) as part:
        write_lora(lora, part, beside={ADAPTER_REPORT: asdict(report)})
        plot_curve(report.curve, part / CURVE_PICTURE, f"{Path(tuned).name} - {Path(base).name}")
    return report


class _Weights:
    """The dense weights of a model, a tensor at a time, and what else it has."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._adapted: dict[str, AdaptedLinear] = dict(adapted_layers(model))
        self._frozen: dict[str, FrozenLinear] = dict(frozen_layers(model))
        self.layers = list(linear_layers(model))
        self.tied = {**model.all_tied_weights_keys}

    @property
    def transposed(self) -> bool:
        """Whether its layers store W as [in_features, out_features]."""
        module = self._module(self.layers[0])
        return kind_of(module).stored(module, torch.empty(2, 3, device="meta")).shape == (3, 2)

    def _module(self, name: str) -> nn.Module:
        return self._frozen.get(name) or self._model.get_submodule(name)

    def shape(self, name: str) -> tuple[int, int]:
        """Return (in_features, out_features) of a linear layer."""
        return kind_of(self._module(name)).shape(self._module(name))

    def nothing(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A and B of an update of rank 1 that is zero."""
        inputs, outputs = self.shape(name)
        return torch.zeros(1, inputs), torch.zeros(outputs, 1)

    def weight(self, name: str) -> Tensor:
        """Return the weight that a linear layer computes with; float64 [out, in]."""
        if name in self._adapted:
            return self._adapted[name].effective_weight()
        module = self._module(name)
        if isinstance(module, FrozenLinear):
            return module.dense_weight(torch.float32).double()
        kind = kind_of(module)
        return kind.rows(module, module.get_parameter(kind.weight).detach()).double()

    def bias(self, name: str) -> Tensor | None:
        """Return the bias that a linear layer adds; float64 [out], or None."""
        own = kind_of(self._module(name)).bias(self._module(name))
        total = None if own is None else own.detach().double()
        move = self._adapted[name].delta_bias() if name in self._adapted else None
        if move is not None:
            total = move if total is None else total + move
        return total

    def others(self) -> dict[str, Tensor]:
        """Return every tensor that is no part of a linear layer, by name."""
        inside = tuple(f"{name}." for name in self.layers)
        state = self._model.state_dict(keep_vars=True)
        return {name: one.detach() for name, one in state.items() if not name.startswith(inside)}

    def is_whole(self, name: str) -> bool:
        """Return whether a tensor is a parameter of a module that has no modules inside."""
        module = name.rpartition(".")[0]
        named = name in dict(self._model.named_parameters(remove_duplicate=False))
        return bool(module) and named and not any(self._model.get_submodule(module).children())


def _check_alike(one: _Weights, other: _Weights, where: str) -> None:
    problems = [f"{name} is in one of them alone" for name in {*one.layers} ^ {*other.layers}]
    problems += [
        f"{name} is {list(one.shape(name))} in the base, {list(other.shape(name))} in the other"
        for name in one.layers
        if name in set(other.layers) and one.shape(name) != other.shape(name)
    ]
    first, second = one.others(), other.others()
    problems += [f"{name} is in one of them alone" for name in first.keys() ^ second.keys()]
    problems += [
        f"{name} is {list(tensor.shape)} in the base, {list(second[name].shape)} in the other; an "
        "adapter cannot hold another number of rows"
        for name, tensor in first.items()
        if name in second and tensor.shape != second[name].shape
    ]
    raise_problems(sorted(problems)[:20], where)


def _bias_move(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return what is added to a layer's bias, float32 [out], or None where nothing is."""
    if other is None and one is None:
        return None
    moved = (0.0 if other is None else other) - (0.0 if one is None else one)
    assert isinstance(moved, Tensor)
    return moved.float() if bool(moved.any()) else None


def _rest(one: _Weights, other: _Weights) -> dict[str, float]:
    """Return the tensors outside linear layers that differ, each with its squared difference.

    What is tied in both models is there once.
    """
    second, found = other.others(), dict[str, float]()
    for name, tensor in one.others().items():
        if name in one.tied and name in other.tied:
            continue
        square = float((second[name].double() - tensor.double()).square().sum())
        if square:
            found[name] = square
    return found


def _kept(
    differing: Mapping[str, float], base: _Weights, tuned: _Weights, where: str
) -> dict[str, Tensor]:
    """Return all parameters of the modules that differ, as the tuned model has them."""
    names = [*differing, *(name for name, same in base.tied.items() if same in differing)]
    problems = [
        f"{name} differs, which an adapter has no place for; --rest drop leaves it out"
        for name in names
        if not tuned.is_whole(name)
    ]
    raise_problems(problems[:20], where)
    modules = {name.rpartition(".")[0] for name in names}
    return {
        name: tensor.clone().contiguous()
        for name, tensor in tuned.others().items()
        if name.rpartition(".")[0] in modules
    }
