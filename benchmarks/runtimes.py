"""One trained run in every runtime: is what each of them loads the model that was trained?

qalora at 4, 3 and 2 bits (groups of 32) on E2E NLG text rows, exported to every target. Each file's
weights, read by the format's own reader, are compared with the merged ones, and `graft verify`
loads it in its runtime: the largest difference of a logit, KL, perplexity, the same next token,
64 greedy tokens on 20 prompts. `gguf F32` is the same weights in F32: llama.cpp then leaves the
activations in float, so what differs in Q4_1 alone is its rounding of them to 8 bits.

    python benchmarks/runtimes.py [--model babyllama-361-1m] [--steps 300] [--bits 4 3 2]
    python benchmarks/runtimes.py --quick                       20 steps, 4 bits
    python benchmarks/runtimes.py --folder F                    keeps its runs in F
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from _common import as_text, e2e_rows, shared, write_csv, write_jsonl
from _file_weights import Weights, largest_difference, read_weights
from _timing import print_table

import graft
from graft.adapters.attach import frozen_layers
from graft.api.certificate import MAX_KL, MAX_LOGIT, MAX_PERPLEXITY, Certificate
from graft.api.run.layout import REPORT
from graft.export import registry
from graft.files.read import read_json

TARGETS = ("gguf", "mlx", "onnx", "openvino", "hf")
FLOAT32_ROUNDING = 2.5e-7
"""Of a weight, as a share of the largest of its matrix, in ONNX and OpenVINO; exact elsewhere."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="babyllama-361-1m")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="20 steps, 4 bits")
    parser.add_argument("--folder", type=Path, help="where the runs stay; default: a temporary one")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.bits = 20, [4]
    model = shared("models", arguments.model)
    runtimes = {target: registry.TARGETS[target].runtime for target in arguments.targets}
    there = [target for target, needed in runtimes.items() if find_spec(needed.module) is not None]
    for target in sorted({*arguments.targets} - {*there}):
        print(f"skipped {target}: needs {runtimes[target].install}")
    folder = arguments.folder or Path(tempfile.mkdtemp())
    data = write_jsonl(folder / "train.jsonl", as_text(e2e_rows("train")))
    held_out = write_jsonl(folder / "test.jsonl", as_text(e2e_rows("test", every=47)))
    results: list[dict[str, object]] = []
    for bits in arguments.bits:
        run = folder / f"run-{bits}"
        if not (run / REPORT).is_file():
            _train(model, run, data, held_out, bits, arguments.steps)
        print(f"{bits} bits: perplexity {read_json(run / REPORT)['perplexity']:.4f}", flush=True)
        files = folder / f"files-{bits}"
        for target in there:
            results.append(_row(run, files, bits, target))
            print(results[-1], flush=True)
        if "gguf" in there:
            results.append(_float32_row(run, files, bits, held_out))
        shutil.rmtree(files)
    print_table(results)
    name = "runtimes-quick" if arguments.quick else f"runtimes-{arguments.model}"
    print(f"wrote {write_csv(name, results)}")
    if arguments.folder is None:
        shutil.rmtree(folder)


def _train(model: Path, run: Path, data: Path, held_out: Path, bits: int, steps: int) -> None:
    graft.finetune(
        graft.TrainConfig(
            model=str(model),
            data=str(data),
            eval_data=str(held_out),
            method="qalora",
            bits=bits,
            eos=False,
            max_length=256,
            steps=steps,
            out=str(run),
        )
    )


def _row(run: Path, files: Path, bits: int, target: str) -> dict[str, object]:
    path = files / registry.TARGETS[target].default_name
    graft.export_model(run, target, path)
    found = graft.verify(run, path)
    return _figures(bits, target, _weight_difference(run, files, target, path), found)


def _float32_row(run: Path, files: Path, bits: int, held_out: Path) -> dict[str, object]:
    """The dequantised folder as a GGUF, which is then in F32."""
    dense = files / "hf"
    if not dense.exists():
        graft.export_model(run, "hf", dense)
    path = files / "float32.gguf"
    graft.export_model(dense, "gguf", path)
    found = graft.verify(dense, path, data=str(held_out))
    return _figures(bits, "gguf F32", _weight_difference(run, files, "gguf", path), found)


def _weight_difference(run: Path, files: Path, target: str, path: Path) -> float:
    merged = files / "merged"
    if not merged.exists():
        graft.merge(run, merged)
    model, _ = graft.load(merged)
    ours: Weights = {name: layer.dense_weight() for name, layer in frozen_layers(model)}
    ours |= {"model.embed_tokens": model.get_input_embeddings().weight.detach()}
    return largest_difference(ours, read_weights(target, path, model.config))


def _figures(bits: int, target: str, weights: float, found: Certificate) -> dict[str, object]:
    fidelity = found.fidelity
    ratio = fidelity.other_perplexity / fidelity.perplexity
    bound = FLOAT32_ROUNDING if target in ("onnx", "openvino") else 0.0
    rounds = found.rounds_activations and target != "gguf F32"
    met = {
        "weights": weights <= bound,
        "file": not found.differing_files,
        "KL": fidelity.mean_kl <= MAX_KL,
        "perplexity": abs(ratio - 1) <= MAX_PERPLEXITY,
        "logits": rounds or fidelity.logit_difference <= MAX_LOGIT,
        "greedy": rounds or found.equal_texts == found.texts,
    }
    missed = ", ".join(name for name, holds in met.items() if not holds)
    return {
        "bits": bits,
        "target": target,
        "weight_difference": f"{weights:.1e}" if weights else "0",
        "logit_difference": f"{fidelity.logit_difference:.1e}",
        "kl": f"{fidelity.mean_kl:.1e}",
        "perplexity_ratio": f"{ratio:.6f}",
        "same_next_token": f"{fidelity.top1_agreement:.4f}",
        "greedy_equal": f"{found.equal_texts}/{found.texts}",
        "gap_where_greedy_differs": f"{found.largest_gap:.2g}" if found.largest_gap else "",
        "bytes": found.bytes,
        "bits_per_weight": found.bits_per_weight,
        "missed": missed,
    }


if __name__ == "__main__":
    main()
