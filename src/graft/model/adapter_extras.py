"""What an adapter brings beside low-rank updates of linear layers: it becomes part of the base.

Embeddings and heads that were trained or resized, updates of them, single tokens, norms, biases and
whole layers (`modules_to_save`) have no place in a run's adapter. They are computed here as PEFT
computes them, and what then differs from the base is set in the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft.adapters.attach import replace_module
from graft.errors import GraftError
from graft.formats.dense import DenseFormat
from graft.layers.frozen import FrozenLinear
from graft.layers.registry import kind_of
from graft.model.adapter_names import Place
from graft.model.peft_files import peft_scaling
from graft.text import quoted

LOW_RANK = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector")
"""The parts of a linear layer's adapter."""
_EMBEDDED = ("lora_embedding_A", "lora_embedding_B")
_TOKENS = "trainable_tokens_delta"


@dataclass
class Extra:
    """What a file has for one module, by part."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    scaling: float = 0.0
    tokens: Sequence[int] = ()
    """The rows that `trainable_tokens_delta` replaces."""
    own_copy: bool = False
    """PEFT trained a copy of the module: what is tied to it keeps the base's weight."""

    @property
    def stored(self) -> dict[str, Tensor]:
        """The parameters that are there as they are to be."""
        updates = (*LOW_RANK, *_EMBEDDED, _TOKENS)
        return {name: tensor for name, tensor in self.parts.items() if name not in updates}

    @property
    def changes_weight(self) -> bool:
        """Whether the module's weight becomes another."""
        return "weight" in self.parts or len(self.stored) < len(self.parts)

    def applied(self, weight: Tensor) -> Tensor:
        """Return the module's weight with what changes it, float32; see PEFT's layers."""
        weight = weight.detach().float()
        if _TOKENS in self.parts:
            index = torch.tensor(list(self.tokens), device=weight.device)
            rows = self.parts[_TOKENS].to(weight)
            weight = weight.index_copy(0, index, rows)
        magnitude = self.parts.get("lora_magnitude_vector")
        if "lora_A.weight" in self.parts:
            down, up = self.parts["lora_A.weight"], self.parts["lora_B.weight"]
            moved = weight.double() + self.scaling * (up.double() @ down.double()).to(weight.device)
            return (moved if magnitude is None else _rescaled(moved, magnitude, 1)).float()
        if _EMBEDDED[0] in self.parts:
            down, up = (self.parts[name].double() for name in _EMBEDDED)
            moved = weight.double() + self.scaling * (up @ down).T.to(weight.device)
            return (moved if magnitude is None else _rescaled(moved, magnitude, 0)).float()
        return weight


def _rescaled(moved: Tensor, magnitude: Tensor, dim: int) -> Tensor:
    """Return DoRA's weight: lengths along a dimension become the trained magnitudes."""
    lengths = torch.linalg.vector_norm(moved, dim=dim, keepdim=True)
    wanted = magnitude.to(moved)
    return moved * (wanted[:, None] if dim else wanted[None]) / lengths


def sort_extras(
    placed: Mapping[str, Place],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    model: PreTrainedModel,
    alphas: Mapping[str, float],
) -> tuple[dict[str, Extra], list[str]]:
    """Return what is not the adapter of a linear layer, by module, and what is wrong with it.

    alphas: of each module, as `peft_alphas` gives them. The model may be on the meta device.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    extras: dict[str, Extra] = {}
    for key, place in placed.items():
        if place.part not in LOW_RANK or place.module not in layers:
            extra = extras.setdefault(place.module, Extra())
            extra.parts[place.part] = tensors[key]
    saved = [one for one in config.get("modules_to_save") or [] if isinstance(one, str)]
    problems = _unsaved(saved, extras, model) + _untold_biases(config, placed.values(), model)
    problems += _set_tokens(config, extras, model)
    for name, extra in extras.items():
        extra.own_copy = any(name.endswith(one) for one in saved)
        for part in {"lora_A.weight", _EMBEDDED[0]} & extra.parts.keys():
            extra.scaling = peft_scaling(config, alphas[name], len(extra.parts[part]))
        problems += _misfits(name, extra, model)
        problems += [
            f"{name}.{part} holds what is infinite or no number"
            for part, tensor in extra.parts.items()
            if not bool(tensor.isfinite().all())
        ]
    return extras, problems


def _unsaved(saved: Iterable[str], extras: Mapping[str, Extra], model: nn.Module) -> list[str]:
    problems = []
    for one in saved:
        named = [name for name, _ in model.named_modules() if name.endswith(one) and name]
        if not any(name.startswith(tuple(named)) for name in extras if named):
            here = "" if named else ", which this model has not"
            problems.append(
                f"modules_to_save has {quoted(one)}{here}; the file has no tensors of it"
            )
    return problems


def _untold_biases(
    config: Mapping[str, Any], places: Iterable[Place], model: nn.Module
) -> list[str]:
    """Return what is missing of the biases that PEFT trained with `bias`."""
    kind = config.get("bias") or "none"
    if kind == "none":
        return []
    if kind not in ("all", "lora_only"):
        return [f"bias is {quoted(kind)}; expected 'none', 'all' or 'lora_only'"]
    places = list(places)
    there = {place.module for place in places if place.part == "bias"}
    adapted = {place.module for place in places if place.part in (*LOW_RANK, *_EMBEDDED)}
    wanted = {
        name
        for name, module in model.named_modules()
        if getattr(module, "bias", None) is not None and (kind == "all" or name in adapted)
    }
    missing = sorted(wanted - there)
    if not missing:
        return []
    return [
        f"bias is {quoted(kind)}, and the file has no bias of {len(missing)} modules, such as "
        f"{missing[0]}; it is not whole"
    ]


def _set_tokens(
    config: Mapping[str, Any], extras: Mapping[str, Extra], model: PreTrainedModel
) -> list[str]:
    """Give each extra the rows that its single tokens replace; return what is wrong with them."""
    given = config.get("trainable_token_indices")
    with_tokens = {name for name, extra in extras.items() if _TOKENS in extra.parts}
    if not given:
        return [
            f"{name} has trained tokens, and trainable_token_indices does not say which"
            for name in sorted(with_tokens)
        ]
    embedding = _name_of(model, model.get_input_embeddings())
    by_name = given if isinstance(given, dict) else {embedding: given}
    problems = []
    for ending, rows in by_name.items():
        found = [name for name in with_tokens if name == ending or name.endswith("." + ending)]
        for name in found:
            extras[name].tokens = rows
        with_tokens -= set(found)
        tied = is_tied(model) and len(by_name) > 1 and not embedding.endswith(ending)
        if not found and not (tied and list(rows) == list(next(iter(by_name.values())))):
            problems.append(f"the trained tokens of {quoted(ending)} are not in the file")
    problems += [f"trainable_token_indices does not name {name}" for name in sorted(with_tokens)]
    return problems


def _misfits(name: str, extra: Extra, model: PreTrainedModel) -> list[str]:
    """Return what of a module's tensors does not fit it; a vocabulary may have another size."""
    module = model.get_submodule(name)
    known = {part: tuple(tensor.shape) for part, tensor in _own_tensors(module)}
    vocabulary = module in (model.get_input_embeddings(), model.get_output_embeddings())
    if isinstance(module, FrozenLinear):
        weight = torch.empty(module.out_features, module.in_features, device="meta")
        known["weight"] = tuple(kind_of(module).stored(module, weight).shape)
    problems, parts = [], extra.parts
    for part, tensor in extra.stored.items():
        shape = tuple(tensor.shape)
        if part not in known:
            problems.append(f"{name} has no {quoted(part)} in this model")
        elif shape != known[part] and not (vocabulary and shape[1:] == known[part][1:] and shape):
            problems.append(f"{name}.{part} is {list(shape)}; the model's is {list(known[part])}")
    if problems or len(parts) == len(extra.stored):
        return problems
    if "weight" not in known:
        return [f"{name} holds no weight to adapt"]
    return _unfit_update(
        name, extra, module, parts.get("weight", torch.empty(known["weight"], device="meta"))
    )


def _own_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _unfit_update(name: str, extra: Extra, module: nn.Module, weight: Tensor) -> list[str]:
    """Return what of the tensors that change a module's weight does not fit it."""
    parts = extra.parts
    if "lora_B.bias" in parts:
        return [f"{name} has a bias in its low-rank update, which has no place in the base"]
    updates = {*LOW_RANK, *_EMBEDDED} & parts.keys()
    pair = _EMBEDDED if isinstance(module, nn.Embedding) else LOW_RANK[:2]
    if updates and updates - {"lora_magnitude_vector"} != set(pair):
        return [f"{name} has {', '.join(sorted(updates))}; expected {' and '.join(pair)}"]
    if weight.ndim != 2:
        return [f"{name} is no embedding and no linear layer, and its tensors are an update of one"]
    rows, columns = weight.shape
    wanted: dict[str, tuple[int, ...]] = {_TOKENS: (len(extra.tokens), columns)}
    if updates:
        rank = len(parts[pair[0]])
        embedded = pair is _EMBEDDED
        wanted[pair[0]] = (rank, rows if embedded else columns)
        wanted[pair[1]] = (columns if embedded else rows, rank)
        wanted["lora_magnitude_vector"] = (columns if embedded else rows,)
    problems = [
        f"{name}.{part} is {list(parts[part].shape)}; expected {list(shape)}"
        for part, shape in wanted.items()
        if part in parts and tuple(parts[part].shape) != shape
    ]
    beyond = [token for token in extra.tokens if not 0 <= token < rows]
    return problems + [f"{name}: token {token} is beyond its {rows} rows" for token in beyond[:1]]


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the output head has the embedding's own weight."""
    head = head_name(model)
    return bool(head) and f"{head}.weight" in set(model.all_tied_weights_keys)


def head_name(model: PreTrainedModel) -> str:
    """Return the name of the output head; empty where there is none."""
    return _name_of(model, model.get_output_embeddings())


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


# What is done to the model ----------------------------------------------------------------------


def apply_extras(
    model: PreTrainedModel, extras: Mapping[str, Extra], tie: bool
) -> tuple[dict[str, str], list[str]]:
    """Set in a loaded model what the extras make of it; return {tensor: how it differs}, and notes.

    What is equal to the base's is left as it is. tie: PEFT's ensure_weight_tying. Raises GraftError
    when embedding and head are left with different vocabularies.
    """
    new, notes = _vocabulary(model, extras, tie)
    for name, extra in extras.items():
        module = model.get_submodule(name)
        for part, tensor in extra.stored.items():
            if part != "weight":
                new[f"{name}.{part}"] = tensor.float()
        if extra.changes_weight and f"{name}.weight" not in new:
            own = extra.parts.get("weight")
            new[f"{name}.weight"] = extra.applied(_weight(module) if own is None else own)
    changed, equal = dict[str, str](), list[str]()
    for key, tensor in new.items():
        name, _, part = key.rpartition(".")
        how = _set(model, name, part, tensor)
        if how is not None:
            changed[key] = how
        elif part in extras.get(name, Extra()).stored:
            equal.append(key)
    if equal:
        more = f" and {len(equal) - 3} more" if len(equal) > 3 else ""
        notes.append(f"copies of the base's own, left out: {', '.join(equal[:3])}{more}")
    return changed, notes


def _vocabulary(
    model: PreTrainedModel, extras: Mapping[str, Extra], tie: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the new weights of the input embedding and the head, where either is concerned."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    first, last = _name_of(model, inputs), _name_of(model, outputs)
    embedding, head = extras.get(first), extras.get(last)
    if (embedding is None and head is None) or not last:
        return {}, []
    notes: list[str] = []
    base, top = _weight(inputs).detach(), _weight(outputs).detach()
    was_tied = is_tied(model)
    if was_tied:
        # A tensor without a copy of its own is read into the weight that both share.
        plain = [
            one.parts["weight"]
            for one in (embedding, head)
            if one is not None and "weight" in one.parts and not one.own_copy
        ]
        if plain:
            base, top = plain[0], plain[-1]
            if len(plain) == 2 and not torch.equal(base, top):
                notes.append(
                    "the base ties its head to its embeddings, and the adapter has two that "
                    "differ: each is kept, and the run's base is not tied"
                )
    embedded = embedding or Extra()
    new_base = embedded.applied(embedded.parts.get("weight", base))
    headed = head or Extra()
    top = headed.parts.get("weight", top)
    if was_tied and not headed.own_copy and head is None and embedding is not None:
        if tie:
            top = new_base
        elif _TOKENS in embedded.parts:
            top = Extra({_TOKENS: embedded.parts[_TOKENS]}, tokens=embedded.tokens).applied(top)
    new_top = headed.applied(top)
    if len(new_base) != len(new_top):
        raise GraftError(
            f"its embeddings have {len(new_base):,} rows and its head {len(new_top):,}: one of "
            "them was resized and the other is not in the file; save both (save_embedding_layers)"
        )
    if was_tied and tie and not torch.allclose(new_base, new_top, rtol=1e-4, atol=1e-6):
        raise GraftError(
            "it says ensure_weight_tying, and its updates of embeddings and head differ: "
            "PEFT loads one of them for both; keep the one that was trained"
        )
    if was_tied and not torch.equal(new_base, new_top):
        _untie(model, outputs)
    return {f"{first}.weight": new_base, f"{last}.weight": new_top}, notes


def _untie(model: PreTrainedModel, head: nn.Module) -> None:
    head.weight = nn.Parameter(_weight(head).detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _weight(module: nn.Module) -> Tensor:
    """Return a module's weight as a model folder stores it."""
    if isinstance(module, FrozenLinear):
        return kind_of(module).stored(module, module.dense_weight(torch.float32))
    return module.get_parameter("weight")


def _set(model: PreTrainedModel, name: str, part: str, value: Tensor) -> str | None:
    """Set a tensor of a module, unless it is equal; return how it differs, in words."""
    module = model.get_submodule(name) if name else model
    frozen = part == "weight" and isinstance(module, FrozenLinear)
    old = _weight(module) if frozen else getattr(module, part)
    value = value.to(old.device)
    if value.shape == old.shape and torch.equal(old.float(), value.float()):
        return None
    if isinstance(module, FrozenLinear) and frozen:
        rows = kind_of(module).rows(module, value.float()).contiguous()
        replace_module(model, name, module.replaced(DenseFormat("float32"), {"weight": rows}))
        return "trained"
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    both = [inputs, outputs] if is_tied(model) and module in (inputs, outputs) else [module]
    fresh: Any = value.contiguous()
    if isinstance(old, nn.Parameter):
        fresh = nn.Parameter(fresh, requires_grad=False)
    for one in both:
        setattr(one, part, fresh)
    if value.shape == old.shape:
        return "trained"
    for one in both:
        for count in ("num_embeddings", "out_features"):
            if hasattr(one, count):
                setattr(one, count, len(value))
    for config in (model.config, model.config.get_text_config()):
        config.vocab_size = len(value)
    return f"resized from {len(old):,} to {len(value):,} rows"
