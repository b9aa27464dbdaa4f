from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from graft.kernels.backend.operation import Operation
from graft.kernels.frozen import ops
from graft.kernels.frozen.row_ops import dense_linear
from graft.kernels.moves.ops import move_scaled

X, W = torch.randn(3, 8), torch.randn(5, 8)


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
    calls = calls_of(dense_linear, monkeypatch)
    y = dense_linear(X.clone().requires_grad_(grad), W)
    torch.testing.assert_close(y, X @ W.T)
    assert y.requires_grad == grad and not calls


def test_a_mode_sees_the_operation_and_its_gradient() -> None:
    x = X.clone().requires_grad_()
    with Seen() as seen:
        dense_linear(x, W).sum().backward()
    assert "graft.dense_linear.default" in seen.names
    assert "graft.dense_grad_input.default" in seen.names


def test_a_mode_of_python_s_functions_sees_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(dense_linear, monkeypatch)
    with torch.device("cpu"):
        dense_linear(X, W)
    assert len(calls) == 1


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_tracing_sees_the_operation(pre_dispatch: bool) -> None:
    graph = make_fx(lambda x: dense_linear(x, W), pre_dispatch=pre_dispatch)(X).graph
    assert torch.ops.graft.dense_linear.default in [node.target for node in graph.nodes]


def test_compiled_code_calls_the_operation() -> None:
    found = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(node.target for node in module.graph.nodes)
        return module.forward

    compiled = torch.compile(lambda x: dense_linear(x, W), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(X), X @ W.T)
    assert torch.ops.graft.dense_linear.default in found


def test_tensors_without_numbers_get_their_shape() -> None:
    assert dense_linear(X.to("meta"), W.to("meta")).shape == (3, 5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert dense_linear(mode.from_tensor(X), W).shape == (3, 5)


def test_a_transform_reaches_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(dense_linear, monkeypatch)
    torch.testing.assert_close(torch.func.vmap(lambda x: dense_linear(x, W))(X), X @ W.T)
    assert len(calls) == 1


def test_any_argument_of_another_type_reaches_the_dispatcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Watched(Tensor):
        pass

    calls = calls_of(dense_linear, monkeypatch)
    dense_linear(X, W.as_subclass(Watched))
    assert len(calls) == 1


def test_a_gradient_that_is_not_declared_is_refused() -> None:
    moves = torch.zeros(2, 2, requires_grad=True)
    moved = move_scaled(torch.ones(2, 2), torch.ones(2, 2), moves, torch.float32)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        moved.sum().backward()


def test_arguments_left_out_have_their_defaults() -> None:
    codes, absmax = ops.codebook_quantize(W, "nf4", 8)
    x = X.clone().requires_grad_()
    ops.codebook_linear(x, codes, absmax, "nf4", 8, 5).sum().backward()
    weight = ops.codebook_dequantize(codes, absmax, "nf4", 8, 5, 8, torch.float32)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 8))


def test_missing_arguments_are_python_s_own_error() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'weight'"):
        dense_linear(X.clone().requires_grad_())


def test_an_output_can_be_changed_in_place() -> None:
    x = X.clone().requires_grad_()
    y = dense_linear(x, W)
    y += 1
    y.sum().backward()
    torch.testing.assert_close(x.grad, W.sum(0).expand(3, 8))
