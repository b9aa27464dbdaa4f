"""Products with inputs of 8 bits beside those with floats, and PyTorch's dynamic quantisation.

One linear layer, `--tokens` tokens: weights of 4 and of 8 bits in groups of 32 with their inputs as
they are, rounded in blocks of 32 (q8) and with one scale a token (q8_token); int8 rows; and
torch.ao.quantization.quantize_dynamic, whose weights have 8 bits and one scale for all. The error
is that of the output beside the dense product, over its norm.

    python benchmarks/activations.py [--features 4096] [--tokens 512] [--dtype float32] [--isa avx2]
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Any

import _isa
import torch
from _common import write_csv
from _timing import OTHER_LOAD_LIMIT, interleave, print_table, run_child, summarise
from torch import Tensor, nn

from graft.formats.base import WeightFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.layers.frozen import FrozenLinear

FORMATS: dict[str, WeightFormat] = {
    "int4": IntGroupFormat(),
    "int8 in groups": IntGroupFormat(bits=8),
    "int8 rows": Int8Format(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--turns", type=int, default=5)
    _isa.add_argument(parser)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        _isa.limit()
        print(json.dumps(_measure(**json.loads(arguments.child))))
        return
    _isa.choose(arguments.isa)
    task = {name: getattr(arguments, name) for name in ("features", "tokens", "dtype", "turns")}
    rows = run_child(__file__, task)
    print_table(rows)
    print(f"wrote {write_csv('activations', [row | task for row in rows])}")


def _measure(features: int, tokens: int, dtype: str, turns: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    weight = torch.randn(features, features) * 0.02
    # A few inputs are much larger than the others, as in language models.
    x = torch.randn(tokens, features) * torch.randn(features).exp()
    computed = getattr(torch, dtype)
    exact, inputs = x @ weight.T, x.to(computed)
    calls: dict[str, Callable[[], Tensor]] = {}
    dense = weight.to(computed)
    calls["dense"] = lambda: nn.functional.linear(inputs, dense)
    for name, weight_format in FORMATS.items():
        packed = weight_format.pack(weight)
        for activations in ("float", "q8", "q8_token"):
            layer = FrozenLinear(features, features, weight_format, packed)
            layer.activations = activations  # type: ignore[assignment]
            calls[f"graft {name}, {activations}"] = lambda layer=layer: layer(inputs)
    peer = _quantised_by_torch(weight)
    calls["torch quantize_dynamic"] = lambda: peer(x)
    with torch.no_grad():
        errors = {
            name: float((call().float() - exact).norm() / exact.norm())
            for name, call in calls.items()
        }
        result = interleave(calls, turns)
    medians = {name: summarise(seconds).median for name, seconds in result.seconds.items()}
    load = f"{result.other:.2f}" + ("!" if result.other > OTHER_LOAD_LIMIT else "")
    return [
        {
            "what": name,
            "ms": f"{1e3 * medians[name]:.1f}",
            "times as fast as dense": f"{medians['dense'] / medians[name]:.2f}",
            "error": f"{errors[name]:.1e}",
            "other load": load,
        }
        for name in calls
    ]


def _quantised_by_torch(weight: Tensor) -> Any:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will move to torchao
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})


if __name__ == "__main__":
    main()
