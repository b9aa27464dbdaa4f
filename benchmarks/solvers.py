"""What each solver's rounding costs: squared layer-output error relative to rounding to nearest.

The sum over all linear layers of |x Wᵀ - x Qᵀ|², x being the layer's inputs in the unrounded model:
on the text that gptq is calibrated on, and on rows of the same data that it has not seen.

    python benchmarks/solvers.py [--models babyllama-361-1m ...] [--data e2e_nlg ...] [--rows 128]
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from _common import shared, write_csv
from torch import Tensor

from graft.calibrate.gptq import gptq_pack
from graft.calibrate.hessian import HessianSum, output_error
from graft.calibrate.hqq import hqq_pack
from graft.formats.base import Packed, WeightFormat
from graft.formats.registry import make_format
from graft.model.load import LoadedModel, load_model
from graft.model.targets import freeze_layers, select_targets

BOUNDS = {("int3", "gptq"): 0.5}
FORMATS: dict[str, tuple[WeightFormat, tuple[str, ...]]] = {
    **{
        f"int{bits}": (make_format("int", {"bits": bits}), ("rtn", "gptq", "hqq"))
        for bits in (4, 3, 2)
    },
    "nf4": (make_format("nf4", {}), ("rtn", "gptq")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["babyllama-361-1m", "mixed-13m"])
    parser.add_argument("--data", nargs="+", default=["e2e_nlg", "tinystories"])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    results: list[dict[str, object]] = []
    for model, data in itertools.product(arguments.models, arguments.data):
        loaded = load_model(str(shared("models", model)), dtype="float32", device="cpu")
        names = select_targets(loaded.model, ())
        freeze_layers(loaded.model, names)
        texts = _texts(data, 2 * arguments.rows)
        seen = _hessians(loaded, names, texts[: arguments.rows], arguments.length)
        unseen = _hessians(loaded, names, texts[arguments.rows :], arguments.length)
        for kind, (weight_format, solvers) in FORMATS.items():
            reference = None
            for solver in solvers:
                row = _measure(loaded, weight_format, solver, seen, unseen)
                reference = reference or row
                relative = {key: row[key] / reference[key] for key in ("error", "unseen_error")}
                results.append(
                    {
                        "model": model,
                        "data": data,
                        "format": kind,
                        "solver": solver,
                        "relative_error": round(relative["error"], 4),
                        "relative_error_unseen": round(relative["unseen_error"], 4),
                        "error": f"{row['error']:.6g}",
                        "bound": BOUNDS.get((kind, solver), ""),
                        "seconds": round(row["seconds"], 2),
                    }
                )
                print(results[-1], flush=True)
    print(f"wrote {write_csv('solvers', results)}")


def _measure(
    loaded: LoadedModel,
    weight_format: WeightFormat,
    solver: str,
    seen: dict[str, Tensor],
    unseen: dict[str, Tensor],
) -> dict[str, float]:
    pack: dict[str, Callable[[Tensor, Tensor], Packed]] = {
        "rtn": lambda weight, _: weight_format.pack(weight),
        "gptq": lambda weight, hessian: gptq_pack(weight, hessian, weight_format),
        "hqq": lambda weight, _: hqq_pack(weight, weight_format),
    }
    total = {"error": 0.0, "unseen_error": 0.0, "seconds": 0.0}
    for name, hessian in seen.items():
        layer = loaded.model.get_submodule(name)
        weight = layer.dense_weight(torch.float32)
        begin = time.perf_counter()
        packed = pack[solver](weight, hessian)
        total["seconds"] += time.perf_counter() - begin
        rounded = weight_format.unpack(packed, *weight.shape, torch.float32)
        total["error"] += output_error(weight, rounded, hessian)
        total["unseen_error"] += output_error(weight, rounded, unseen[name])
    return total


def _texts(data: str, count: int) -> list[str]:
    with gzip.open(shared("data", data, "train.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, count)]
    return [row.get("text") or row["prompt"] + "\n" + row["completion"] for row in rows]


@torch.no_grad()
def _hessians(
    loaded: LoadedModel, names: list[str], texts: list[str], length: int
) -> dict[str, Tensor]:
    """Return the sum of x xᵀ over the inputs of each layer, from one pass over the texts."""
    sums = {}
    with ExitStack() as hooks:
        for name in names:
            layer = loaded.model.get_submodule(name)
            sums[name] = HessianSum(layer.in_features)
            add = sums[name].add
            handle = layer.register_forward_pre_hook(lambda _, inputs, add=add: add(inputs[0]))
            hooks.callback(handle.remove)
        for text in texts:
            ids = loaded.tokenizer(text, truncation=True, max_length=length).input_ids
            loaded.model(input_ids=torch.tensor([ids]))
    return {name: total.value for name, total in sums.items()}


if __name__ == "__main__":
    main()
