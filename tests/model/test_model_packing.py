"""Packed rows: the logits, the loss and the gradients of the same rows, each alone."""

from __future__ import annotations

import pytest
import torch
from small_models import PLAIN, model_of
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from graft.adapters.registry import METHODS, method_of
from graft.api.checks import format_description
from graft.api.config import TrainConfig
from graft.data.batches import collate, pack
from graft.data.examples import Example
from graft.errors import GraftError
from graft.formats.registry import parse_format
from graft.kernels.backend import native_library
from graft.model.load import load_model
from graft.model.running import attention as attention_module
from graft.model.running.attention import use_own_attention
from graft.model.running.checkpointing import CHECKPOINTING, enable_checkpointing
from graft.model.running.loss import target_loss
from graft.model.running.packing import check_packing, packed
from graft.model.targets import freeze_layers, select_targets
from graft.model.trained import what_trains

CPU = torch.device("cpu")
LENGTHS = (23, 5, 40, 1, 9)
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0).int()


def ids() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(96, (1, sum(LENGTHS)), generator=generator)


def logits_alone(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    rows = [model(row, use_cache=False).logits[0] for row in tokens.split(LENGTHS, dim=1)]
    return torch.cat(rows)


def logits_packed(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False, **packed(STARTS, CPU)).logits[0]


class Sizes(TorchDispatchMode):
    """Notes the two last sizes of every result."""

    def __init__(self) -> None:
        super().__init__()
        self.squares: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() > 1:
            self.squares.add(tuple(out.shape[-2:]))
        return out


@pytest.mark.parametrize("window", [None, 8], ids=["whole", "window"])
@pytest.mark.parametrize("family", PLAIN)
def test_logits_are_those_of_the_rows_alone(family: str, window: int | None) -> None:
    """Families with a window get rows that are longer, beside some that are not."""
    sliding = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}
    model = model_of(family, **(sliding if window else {}))
    with torch.no_grad():
        expected = logits_alone(model, ids())
        assert use_own_attention(model)
        check_packing(model)
        with Sizes() as sizes:
            got = logits_packed(model, ids())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert (sum(LENGTHS), sum(LENGTHS)) not in sizes.squares, "a mask or scores of all tokens"


def test_no_row_sees_another_bit_for_bit() -> None:
    model = model_of("llama")
    assert use_own_attention(model)
    tokens = ids()
    begin, end = STARTS[2:4].tolist()
    other = tokens.clone()
    other[:, begin:end] = (other[:, begin:end] + 1) % 96
    with torch.no_grad():
        before, after = logits_packed(model, tokens), logits_packed(model, other)
    same = torch.ones(len(before), dtype=torch.bool)
    same[begin:end] = False
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[begin:end], after[begin:end])


def test_without_our_kernels_each_row_goes_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, or in another dtype: no mask of all tokens either."""
    monkeypatch.setattr(attention_module, "why_unavailable", lambda: "no compiler")
    for changes in ({}, {"sliding_window": 8}):
        model = model_of("mistral", **changes)
        with torch.no_grad():
            expected = logits_alone(model, ids())
            assert use_own_attention(model)
            check_packing(model)
            got = logits_packed(model, ids())
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_rounding_is_no_leak() -> None:
    half, double = torch.bfloat16, torch.float64
    for family, dtype in (("llama", half), ("mixtral", half), ("llama", double)):
        model = model_of(family).to(dtype)
        assert use_own_attention(model)
        check_packing(model)


def test_a_damaged_model_is_not_told_that_it_cannot_pack() -> None:
    model = model_of("llama")
    assert use_own_attention(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    check_packing(model)


def test_rows_that_would_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    with pytest.raises(GraftError, match="does not leave its attention to graft"):
        check_packing(model)
    assert use_own_attention(model)
    modes = [module.training for module in model.train().modules()]
    monkeypatch.setattr(attention_module, "attention", seeing)
    with pytest.raises(GraftError, match="not those of the rows alone.*--batching grouped"):
        check_packing(model)
    assert [module.training for module in model.modules()] == modes


def seeing(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, None]:
    """Attention that forgets where sequences start."""
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2), None


# Loss and gradients -------------------------------------------------------------------------------


def examples() -> list[Example]:
    rows = ids().remainder(90).squeeze(0).split(LENGTHS)
    return [Example(row.tolist(), [i % 3 > 0 for i in range(len(row))], "") for row in rows]


def trainable(base, method: str, **changes: object) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return a model in float32 as a training has it, a little away from its start."""
    given = {"method": method, "rank": 4} | changes
    config = TrainConfig(model=str(base), data="none", out="none", **given)
    description = format_description(config, method)
    weight_format = None if description is None else parse_format(description)
    config = config.resolved(None if weight_format is None else weight_format.bits)
    model = load_model(str(base), weight_format=weight_format, dtype="float32").model
    assert use_own_attention(model)
    names = select_targets(model, ())
    if weight_format is None and method != "full":
        freeze_layers(model, names)
    parameters = method_of(config).make_trainable(model, what_trains(model, config), config)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter) * 1e-2)
    return model.train(), parameters


def gradients(model, parameters, batch, starts=None) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss, count = target_loss(model, batch.input_ids, batch.labels, starts)
    assert count == batch.targets
    (loss / count).backward()
    return loss.item() / count, {name: one.grad.clone() for name, one in parameters.items()}


def assert_as_padded(model: PreTrainedModel, parameters: dict[str, Tensor]) -> None:
    loss, expected = gradients(model, parameters, collate(examples()))
    batch = pack(examples())
    got, found = gradients(model, parameters, batch, batch.starts)
    assert got == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


CASES = {name: (name, {}) for name in METHODS} | {"dora": ("lora", {"dora": True})}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_padded_rows(case: str, tiny_base) -> None:
    method, changes = CASES[case]
    assert_as_padded(*trainable(tiny_base, method, **changes))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_gradients_are_those_of_padded_rows_with_checkpointing(checkpointing, tiny_base) -> None:
    """The rows' starts reach what is recomputed in the backward pass."""
    model, parameters = trainable(tiny_base, "lora")
    enable_checkpointing(model, checkpointing)
    assert_as_padded(model, parameters)


def test_a_model_that_runs_as_a_whole_packs_too(tiny_base, monkeypatch) -> None:
    monkeypatch.setattr("graft.model.running.loss.splits", lambda model, ids: False)
    assert_as_padded(*trainable(tiny_base, "lora"))


@pytest.mark.skipif(native_library.why_unavailable() is not None, reason="no native kernels")
def test_packed_and_padded_rows_give_the_same_bits(tiny_base) -> None:
    """Padding adds zeros to sums that run in the same order: packing is not even rounded."""
    for method in ("qlora", "merge_aware"):
        model, parameters = trainable(tiny_base, method)
        batch = pack(examples())
        _, expected = gradients(model, parameters, collate(examples()))
        _, got = gradients(model, parameters, batch, batch.starts)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
