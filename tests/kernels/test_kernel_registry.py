from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import graft.kernels as kernels
from graft.kernels.backend import registry
from graft.kernels.backend.operation import Operation
from graft.kernels.backend.reference import reference
from graft.kernels.backend.registry import Backend, backends, implementation, register_backend
from graft.kernels.low_rank import reference as low_rank_reference
from graft.kernels.moves import reference as moves_reference
from graft.kernels.packed.weight import Layout, Weight

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


def declared() -> dict[str, Operation]:
    """Return every operation that any module of the kernels declares."""
    found = {}
    for module in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + "."):
        if "triton_" in module.name or "._native" in module.name:
            continue  # which need triton, or are no Python
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Operation):
                found[value.name] = value
    return found


# An adapted layer's operation that is made of others needs no implementation of its own.
COMPOSED = {
    "affine_linear",
    "latent_linear",
    "qalora_grid_linear",
    "qalora_linear",
}

# What other operations, or the loss, call of a backend directly.
PARTS = {"pool", "cross_entropy"}


def test_the_reference_backend_implements_every_operation() -> None:
    assert set(declared()) - COMPOSED == set(reference.operations) - PARTS
    assert reference.device_types is None
    assert reference.why_unavailable() is None
    for backend in backends():
        assert set(backend.operations) <= set(reference.operations)


def test_whoever_declares_operations_registers_all_implementations() -> None:
    """So that what computes does not depend on what was imported before."""
    (root,) = map(Path, kernels.__path__)
    texts = {file: file.read_text(encoding="utf-8") for file in root.rglob("*.py")}
    declaring = [file for file, text in texts.items() if "\n@Operation\n" in text]
    assert len(declaring) >= 6
    assert all("import graft.kernels.backends " in texts[file] for file in declaring)
    (listed,) = (text for file, text in texts.items() if file.name == "backends.py")
    for file, text in texts.items():
        module = ".".join(file.with_suffix("").relative_to(root).parts)
        assert ('.implements("' in text) == (f"import graft.kernels.{module}" in listed)


@pytest.mark.usefixtures("empty")
def test_the_reference_calls_no_other_backend() -> None:
    layout = Layout("int_group", 6, 32, bits=4, group_size=8)
    tensors = torch.zeros(6, 16, dtype=torch.uint8), None, torch.ones(6, 4), torch.zeros(6, 4)
    weight, factors = Weight(layout, tensors), (torch.ones(2, 32), torch.ones(6, 2), 1.0)
    low_rank_reference.lora_linear(torch.ones(3, 32), weight, *factors)
    low_rank_reference.lora_grad_input(torch.ones(3, 6), weight, *factors)
    moves = torch.ones(2, 4), torch.ones(6, 2), 1.0, torch.ones(2, 4), torch.ones(6, 2)
    moves_reference.move_by_factors(*weight.statistics, *moves)
