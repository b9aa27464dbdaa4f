"""The native kernels on every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from graft.kernels import native_library

LEVELS = {"baseline": 0, "AVX2": 1, "AVX-512": 2, "AVX-512+BF16": 3}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, by name, to which the library is limited while a test runs."""
    reason = native_library.why_unavailable()
    if reason is not None:
        pytest.skip(f"native backend: {reason}")
    library = native_library.library()
    if library.graft_limit(LEVELS[request.param]) != LEVELS[request.param]:
        library.graft_limit(max(LEVELS.values()))
        pytest.skip(f"this processor has no {request.param}")
    assert native_library.instructions() == request.param
    yield request.param
    library.graft_limit(max(LEVELS.values()))
