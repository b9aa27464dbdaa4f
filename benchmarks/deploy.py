"""Train = deploy: qalora and affine at 4, 3 and 2 bits, each carried through to a GGUF file.

For every run: are the logits of adapter model, merged model and reloaded merged model equal bit for
bit (float32 compute)? Does every weight in the GGUF, read by gguf's own reader, equal the merged
one? With llama-cpp-python: the perplexity on held-out lines, and 64 greedy tokens on 20 prompts.

    python benchmarks/deploy.py [--steps 100]
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from _common import as_text, e2e_rows, shared, write_csv, write_jsonl

import graft
from graft.adapters.attach import frozen_layers
from graft.layers.activations import compute_with
from graft.model.gguf.layout import gguf_names, rotary_heads, rows_from_gguf

HELD_OUT_LINES = 200
PROMPTS = 20
NEW_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="babyllama-361-1m")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--methods", nargs="+", default=["qalora", "affine"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--activations", default="float", help="float, q8 or q8_token")
    arguments = parser.parse_args()
    model = shared("models", arguments.model)
    folder = Path(tempfile.mkdtemp())
    data = write_jsonl(folder / "train.jsonl", as_text(e2e_rows("train")[:8000]))
    held_out_rows = e2e_rows("test", every=23)[:HELD_OUT_LINES]
    held_out = as_text(held_out_rows)
    prompts = [row["prompt"] + "\n" for row in held_out_rows[:PROMPTS]]
    evaluation = write_jsonl(folder / "test.jsonl", held_out)
    results: list[dict[str, object]] = []
    for method in arguments.methods:
        for bits in arguments.bits:
            run = folder / f"{method}-{bits}"
            report = graft.finetune(
                graft.TrainConfig(
                    model=str(model),
                    data=str(data),
                    eval_data=str(evaluation),
                    method=method,
                    bits=bits,
                    eos=False,
                    max_length=256,
                    dtype="float32",
                    activations=arguments.activations,
                    steps=arguments.steps,
                    out=str(run),
                )
            )
            row: dict[str, object] = {"method": method, "bits": bits}
            row["perplexity"] = round(report.perplexity, 5)
            row |= _checks(run, [line["text"] for line in held_out], prompts, arguments.activations)
            results.append(row)
            print(row, flush=True)
    print(f"wrote {write_csv('deploy', results)}")
    shutil.rmtree(folder)


def _checks(run: Path, lines: list[str], prompts: list[str], activations: Any) -> dict[str, object]:
    merged_folder, file = run / "merged", run / "model.gguf"
    trained, tokenizer = graft.load(run)
    graft.merge(run, merged_folder)
    merged, _ = graft.load(merged_folder)
    graft.export_model(run, "gguf", file)
    exported, _ = graft.load(file, tokenizer=str(merged_folder))
    for model in (merged, exported):
        compute_with(model, activations)
    ids = [tokenizer(line, truncation=True, max_length=256)["input_ids"] for line in lines]
    starts = [tokenizer(prompt)["input_ids"][:192] for prompt in prompts]
    with torch.no_grad():
        probe = torch.tensor([row[:100] for row in ids if len(row) >= 100][:8])
        logits = [m(input_ids=probe).logits for m in (trained, merged, exported)]
    row: dict[str, object] = {
        "merged_logits_equal": torch.equal(logits[0], logits[1]),
        "gguf_reader_logits_equal": torch.equal(logits[0], logits[2]),
        "gguf_weights_equal": _weights_equal(merged, file),
    }
    if find_spec("llama_cpp") is None:
        return row
    row |= _against_llama_cpp(merged, file, ids, starts)
    # The same weights in F32: llama.cpp then leaves the activations in float, so what differs
    # with Q4_1 and not here is its rounding of activations to 8 bits, not the file.
    graft.export_model(run, "hf", run / "dense")
    graft.export_model(run / "dense", "gguf", run / "dense.gguf")
    exact = _against_llama_cpp(merged, run / "dense.gguf", ids[:1], starts)
    row["greedy_equal_f32"] = exact["greedy_equal"]
    return row


def _weights_equal(merged: Any, file: Path) -> bool:
    """Compare every quantised weight of the file, through gguf's own dequantiser."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = gguf_names(merged.config)
    equal = True
    for name, layer in frozen_layers(merged):
        tensor = tensors[f"{names(name)}.weight"]
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        heads = rotary_heads(name, merged.config)
        if heads is not None:
            weight = weight[rows_from_gguf(weight.shape[0], heads)]
        equal &= torch.equal(weight, layer.dense_weight())
    return equal


def _against_llama_cpp(
    merged: Any, file: Path, ids: list[list[int]], starts: list[list[int]]
) -> dict[str, object]:
    import llama_cpp

    peer = llama_cpp.Llama(
        str(file),
        n_ctx=256,
        logits_all=True,
        verbose=False,
        n_threads=2,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    ours = theirs = 0.0
    count = 0
    for row in ids:
        targets = torch.tensor(row[1:])
        with torch.no_grad():
            own = merged(input_ids=torch.tensor([row])).logits[0, :-1].double()
        peer.reset()
        peer.eval(row)
        other = torch.from_numpy(np.array(peer.scores[: len(row) - 1])).double()
        ours += torch.nn.functional.cross_entropy(own, targets, reduction="sum").item()
        theirs += torch.nn.functional.cross_entropy(other, targets, reduction="sum").item()
        count += len(targets)
    pairs = [(_greedy_ours(merged, start), _greedy(peer, start)) for start in starts]
    same = sum(ours == theirs for (ours, _), theirs in pairs)
    gaps = [_gap(*pair) for pair in pairs if pair[0][0] != pair[1]]
    return {
        "perplexity_ours": round(math.exp(ours / count), 5),
        "perplexity_llama_cpp": round(math.exp(theirs / count), 5),
        "difference_percent": round(100 * (math.exp((theirs - ours) / count) - 1), 4),
        "greedy_equal": f"{same}/{len(starts)}",
        "gap_where_greedy_differs": round(max(gaps, default=0.0), 4),
    }


def _greedy_ours(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Return the greedy tokens and, for each, the gap between the two largest logits."""
    tokens, gaps = list(prompt), []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        best = logits.topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
    return tokens[len(prompt) :], gaps


def _gap(ours: tuple[list[int], list[float]], theirs: list[int]) -> float:
    """Return our gap between the two largest logits at the first token that differs."""
    first = next(i for i, (a, b) in enumerate(zip(ours[0], theirs, strict=True)) if a != b)
    return ours[1][first]


def _greedy(peer: Any, prompt: list[int]) -> list[int]:
    peer.reset()
    peer.eval(prompt)
    tokens: list[int] = []
    for _ in range(NEW_TOKENS):
        tokens.append(int(np.argmax(peer.scores[peer.n_tokens - 1])))
        peer.eval([tokens[-1]])
    return tokens


if __name__ == "__main__":
    main()
