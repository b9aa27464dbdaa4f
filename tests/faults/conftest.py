from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults import shim
from faults.scenarios import Bench


@pytest.fixture(scope="session")
def needs_shim() -> None:
    """Skip where file operations cannot be intercepted."""
    reason = shim.why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def bench(needs_shim: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A warm process and a box; all rounds of a session share the uninterrupted runs."""
    with Bench(tmp_path_factory.mktemp("faults") / "work") as bench:
        yield bench
