from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from graft.kernels.backend.operation import Operation
from graft.kernels.frozen.ops import linear
from graft.kernels.moves.ops import move_scaled
from graft.kernels.packed.weight import Weight, dense_weight, save_weight, saved_weight

X, W = torch.randn(3, 8), torch.randn(5, 8)


WEIGHT = dense_weight(W)


class Seen(TorchDispatchMode):
    """Keeps the names of the operations that PyTorch's dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def calls_of(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Return a list that will hold the arguments of the calls that reach the dispatcher."""
    calls = []
    registered = operation.registered

    def spy(*arguments: Any) -> Any:
        calls.append(arguments)
        return registered(*arguments)

    monkeypatch.setattr(operation, "registered", spy)
    return calls


@pytest.mark.parametrize("grad", [False, True])
def test_a_call_that_nobody_watches_does_not_reach_the_dispatcher(
    grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of(linear, monkeypatch)
    y = linear(X.clone().requires_grad_(grad), WEIGHT)
    torch.testing.assert_close(y, X @ W.T)
    assert y.requires_grad == grad and not calls


def test_a_mode_sees_the_operation_and_its_gradient() -> None:
    x = X.clone().requires_grad_()
    with Seen() as seen:
        linear(x, WEIGHT).sum().backward()
    assert "graft.linear.default" in seen.names
    assert "graft.grad_input.default" in seen.names


def test_a_mode_of_python_s_functions_sees_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(linear, monkeypatch)
    with torch.device("cpu"):
        linear(X, WEIGHT)
    assert len(calls) == 1


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_tracing_sees_the_operation(pre_dispatch: bool) -> None:
    graph = make_fx(lambda x: linear(x, WEIGHT), pre_dispatch=pre_dispatch)(X).graph
    assert torch.ops.graft.linear.default in [node.target for node in graph.nodes]


def test_compiled_code_calls_the_operation() -> None:
    found = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(node.target for node in module.graph.nodes)
        return module.forward

    compiled = torch.compile(lambda x: linear(x, WEIGHT), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(X), X @ W.T)
    assert torch.ops.graft.linear.default in found


def test_tensors_without_numbers_get_their_shape() -> None:
    assert linear(X.to("meta"), dense_weight(W.to("meta"))).shape == (3, 5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert linear(mode.from_tensor(X), WEIGHT).shape == (3, 5)


def test_a_transform_reaches_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(linear, monkeypatch)
    torch.testing.assert_close(torch.func.vmap(lambda x: linear(x, WEIGHT))(X), X @ W.T)
    assert len(calls) == 1


def test_any_argument_of_another_type_reaches_the_dispatcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Watched(Tensor):
        pass

    calls = calls_of(linear, monkeypatch)
    linear(X, dense_weight(W.as_subclass(Watched)))
    assert len(calls) == 1


def test_a_gradient_that_is_not_declared_is_refused() -> None:
    moves = torch.zeros(2, 2, requires_grad=True)
    moved = move_scaled(torch.ones(2, 2), torch.ones(2, 2), moves, torch.float32)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        moved.sum().backward()


@Operation
def toy_scaled(x: Tensor, weight: Weight, scaling: float = 2.0) -> Tensor:
    """Return scaling x Wᵀ."""
    (dense,) = weight.tensors
    return scaling * (x @ dense.T)


@toy_scaled.register_fake
def _(x: Tensor, weight: Weight, scaling: float = 2.0) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.layout.out_features))


def _toy_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, ctx.scaling = inputs
    save_weight(ctx, weight)


def _toy_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, () = saved_weight(ctx)
    return ctx.scaling * (grad @ weight.tensors[0]), None, None


toy_scaled.register_autograd(_toy_backward, setup_context=_toy_save)


def test_arguments_left_out_have_their_defaults() -> None:
    x = X.clone().requires_grad_()
    toy_scaled(x, WEIGHT).sum().backward()
    torch.testing.assert_close(x.grad, 2 * W.sum(0).expand(3, 8))


def test_the_operator_takes_a_weight_s_tensors_and_its_layout_as_a_word(opcheck) -> None:
    names = [argument.name for argument in torch.ops.graft.toy_scaled.default._schema.arguments]
    assert names == ["x", "first", "second", "third", "fourth", "layout", "scaling"]
    opcheck(toy_scaled, (X.clone().requires_grad_(), WEIGHT, 0.5))


def test_the_backward_pass_gets_a_layer_s_very_weight() -> None:
    """So what a backend prepared of it is found again; of other tensors nothing is kept alive."""
    for dense, same in ((torch.nn.Parameter(W, requires_grad=False), True), (W, False)):
        weight = dense_weight(dense)
        y = linear(X.clone().requires_grad_(), weight)
        found, _ = saved_weight(y.grad_fn)
        assert (found is weight) == (y.grad_fn.weight is weight) == same
        assert torch.equal(found.tensors[0], W)


def test_missing_arguments_are_python_s_own_error() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'weight'"):
        linear(X.clone().requires_grad_())


def test_an_output_can_be_changed_in_place() -> None:
    x = X.clone().requires_grad_()
    y = linear(x, WEIGHT)
    y += 1
    y.sum().backward()
    torch.testing.assert_close(x.grad, W.sum(0).expand(3, 8))
