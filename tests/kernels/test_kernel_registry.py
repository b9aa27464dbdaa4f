from __future__ import annotations

import pytest
import torch

from graft.kernels.attention import ops as attention_ops
from graft.kernels.backend import registry
from graft.kernels.backend.operation import Operation
from graft.kernels.backend.registry import Backend, backends, implementation, register_backend
from graft.kernels.frozen import ops
from graft.kernels.latent import ops as latent_ops
from graft.kernels.low_rank import ops as low_rank_ops
from graft.kernels.moves import ops as affine_ops
from graft.kernels.pointwise import ops as pointwise_ops

CPU = torch.device("cpu")


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_backends", [])


def add(name: str, priority: int, result: str, **options) -> Backend:
    backend = register_backend(Backend(name=name, priority=priority, **options))
    backend.implements("op")(lambda: result)
    return backend


@pytest.mark.usefixtures("empty")
def test_the_highest_priority_is_asked_first_whatever_the_order() -> None:
    add("low", 1, "from low")
    add("high", 5, "from high")
    add("middle", 3, "from middle")
    assert [backend.name for backend in backends()] == ["high", "middle", "low"]
    assert implementation("op", CPU)() == "from high"


@pytest.mark.usefixtures("empty")
def test_a_backend_is_passed_over_for_device_operation_or_availability() -> None:
    add("cuda", 9, "from cuda", device_types=frozenset({"cuda"}))
    add("broken", 8, "from broken", why_unavailable=lambda: "no compiler")
    register_backend(Backend(name="other", priority=7)).implements("another")(lambda: None)
    add("plain", 0, "from plain", device_types=frozenset({"cpu"}))
    assert implementation("op", CPU)() == "from plain"
    assert implementation("op", torch.device("cuda"))() == "from cuda"
    with pytest.raises(LookupError) as caught:
        implementation("op", torch.device("meta"))
    message = str(caught.value)
    assert "no backend computes op on meta" in message
    assert "cuda does not compute on meta" in message
    assert "broken is unavailable: no compiler" in message
    assert "other does not implement it" in message


@pytest.mark.usefixtures("empty")
def test_a_name_is_registered_once() -> None:
    add("one", 1, "")
    with pytest.raises(ValueError, match="'one' is registered twice"):
        add("one", 2, "")


def test_the_reference_backend_implements_every_operation() -> None:
    (reference,) = (backend for backend in backends() if backend.name == "reference")
    declared = {
        name
        for module in (
            affine_ops,
            latent_ops,
            ops,
            low_rank_ops,
            attention_ops,
            pointwise_ops,
        )
        for name, value in vars(module).items()
        if isinstance(value, Operation)
    }
    # An adapted layer's operation that is made of others needs no implementation of its own.
    composed = {"qalora_linear", "qalora_grid_linear", "affine_linear", "latent_linear"}
    assert declared - composed == set(reference.operations) - {"pool"}
    assert reference.device_types is None
    assert reference.why_unavailable() is None
