"""Which backend computes an operation on a device.

An operation is declared once (`graft.kernels.frozen.ops`: schema, fake kernel, gradient). Backends
register implementations against it; the first available backend, in order of priority, that
computes on the tensor's device is called. The reference backend implements everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

Implementation = Callable[..., Any]
F = TypeVar("F", bound=Implementation)


def _always_available() -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """A set of implementations that share a device and a reason to be unavailable."""

    name: str
    priority: int
    """Higher is asked first."""
    device_types: frozenset[str] | None = None
    """Device types that it computes on; None means every device."""
    why_unavailable: Callable[[], str | None] = _always_available
    """Returns None when the backend works on this machine, else the reason why it does not."""
    operations: dict[str, Implementation] = field(default_factory=dict)

    def implements(self, operation: str) -> Callable[[F], F]:
        """Register the decorated function as this backend's implementation of `operation`."""

        def register(function: F) -> F:
            self.operations[operation] = function
            return function

        return register


_backends: list[Backend] = []


def register_backend(backend: Backend) -> Backend:
    """Add a backend; raises ValueError when its name is taken."""
    if any(known.name == backend.name for known in _backends):
        raise ValueError(f"backend {backend.name!r} is registered twice")
    _backends.append(backend)
    _backends.sort(key=lambda known: -known.priority)
    return backend


def backends() -> tuple[Backend, ...]:
    """Return all registered backends, highest priority first."""
    return tuple(_backends)


def implementation(operation: str, device: torch.device) -> Implementation:
    """Return the function that computes `operation` on `device`; raises as `backend_of` does."""
    return backend_of(operation, device).operations[operation]


def backend_of(operation: str, device: torch.device) -> Backend:
    """Return the backend that computes `operation` on `device`.

    Raises LookupError when no available backend implements it there, and says why.
    """
    device_type = device.type
    for backend in _backends:
        # In this order: the first two are quick, and every product on a GPU waits for them.
        if (
            (backend.device_types is None or device_type in backend.device_types)
            and operation in backend.operations
            and backend.why_unavailable() is None
        ):
            return backend
    reasons = "; ".join(_why_not(backend, operation, device_type) for backend in _backends)
    raise LookupError(f"no backend computes {operation} on {device}: {reasons}")


def _why_not(backend: Backend, operation: str, device_type: str) -> str:
    if backend.device_types is not None and device_type not in backend.device_types:
        return f"{backend.name} does not compute on {device_type}"
    if operation not in backend.operations:
        return f"{backend.name} does not implement it"
    return f"{backend.name} is unavailable: {backend.why_unavailable()}"
