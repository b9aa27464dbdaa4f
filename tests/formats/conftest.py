from __future__ import annotations

import pytest

from graft.formats.registry import FORMATS, make_format

# A format that is added to the registry is tested with its defaults even when it is not here.
OPTIONS = {
    "dense": [{"dtype": "float32"}, {"dtype": "bfloat16"}],
    "nf4": [{"double_quant": False}, {"double_quant": True}],
    "fp4": [{"double_quant": False}, {"double_quant": True}],
    "int": [
        {"bits": 2, "group_size": 8},
        {"bits": 2, "group_size": 32},
        {"bits": 3, "group_size": 16},
        {"bits": 3, "group_size": 128},
        {"bits": 4},
        {"bits": 4, "group_size": 64, "statistics": "float32"},
        {"bits": 8, "group_size": 32},
    ],
    "latent": [{}, {"dtype": "int8"}, {"dtype": "int8", "bits": 2, "group_size": 8}],
}
VARIANTS = [(name, options) for name in FORMATS for options in OPTIONS.get(name, [{}])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test that asks for `variant` each registered format with several options."""
    if "variant" in metafunc.fixturenames:
        ids = ["-".join([name, *map(str, options.values())]) for name, options in VARIANTS]
        metafunc.parametrize("variant", VARIANTS, ids=ids)


@pytest.fixture
def weight_format(variant):
    return make_format(*variant)
