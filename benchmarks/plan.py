"""The planned peak memory of training runs beside the measured one.

Each case is `graft.finetune` in a fresh process on random weights: the whole run, from reading the
weights to the last step, with an evaluation before and after. A plan is good within 5 % or 50 MB.
Rows are as long as they may be, or of all lengths where they are packed.

    python benchmarks/plan.py [--only 0.1b]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from _common import shared, write_csv, write_jsonl
from _timing import print_table

SHAPES = {  # hidden, layers, intermediate, heads, key-value heads
    "0.05b": (512, 8, 1408, 8, 4),
    "0.1b": (768, 12, 2048, 12, 12),
    "0.4b": (1024, 24, 2816, 16, 8),
    "1.1b": (2048, 22, 5632, 32, 4),
}


@dataclass(frozen=True)
class Case:
    shape: str
    method: str
    batch_size: int
    length: int
    checkpointing: str
    dtype: str = "bfloat16"
    format: str | None = None
    dense_fraction: float | None = None
    solver: str | None = None
    batching: str = "padded"


CASES = (
    Case("0.05b", "qlora", 1, 128, "none"),
    Case("0.05b", "full", 2, 128, "none"),
    Case("0.05b", "qalora", 8, 512, "none"),
    Case("0.05b", "lora", 4, 256, "none", "float32"),
    Case("0.1b", "lora", 4, 256, "none"),
    Case("0.1b", "lora", 4, 256, "layers"),
    Case("0.1b", "qlora", 4, 512, "none"),
    Case("0.1b", "qlora", 4, 512, "products"),
    Case("0.1b", "qlora", 4, 512, "layers"),
    Case("0.1b", "qalora", 4, 256, "none"),
    Case("0.1b", "affine", 2, 256, "none"),
    Case("0.1b", "merge_aware", 2, 256, "none", dense_fraction=0.0, solver="rtn"),
    Case("0.1b", "merge_aware", 2, 256, "none", "bfloat16", "nf4", 0.0, "rtn"),
    Case("0.1b", "qlora", 8, 512, "none", batching="packed"),
    Case("0.1b", "qalora", 8, 512, "products", batching="packed"),
    Case("0.1b", "lora", 16, 256, "layers", batching="packed"),
    Case("0.1b", "merge_aware", 8, 256, "none", "bfloat16", "nf4", 0.0, "rtn", "packed"),
    Case("0.4b", "qlora", 2, 256, "none"),
    Case("0.4b", "qalora", 2, 512, "products"),
    Case("0.4b", "merge_aware", 1, 256, "none", "bfloat16", "nf4", 0.0, "rtn"),
    Case("0.4b", "full", 1, 128, "layers"),
    Case("1.1b", "qlora", 1, 256, "none"),
    Case("1.1b", "qlora", 2, 512, "products"),
    Case("1.1b", "qlora", 2, 512, "half"),
    Case("1.1b", "qlora", 2, 512, "layers", "float32"),
)


def write_model(folder: Path, shape: str) -> None:
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, intermediate, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
    )
    config.dtype = torch.bfloat16
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared("models", "mixed-13m", name), folder)


def child(case: Case, model: str, data: str, out: str) -> None:
    import graft

    config = graft.TrainConfig(
        model=model,
        data=data,
        out=out,
        method=case.method,
        steps=2 if case.batching == "padded" else 6,
        batching=case.batching,
        batch_size=case.batch_size,
        max_length=case.length,
        checkpointing=case.checkpointing,
        dtype=case.dtype,
        format=case.format,
        dense_fraction=case.dense_fraction,
        solver=case.solver,
        eos=False,
    )
    report = graft.finetune(config)
    print(json.dumps([report.planned_memory_bytes, report.peak_memory_bytes]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--packed", action="store_true", help="the cases of packed rows alone")
    parser.add_argument("--checkpointing", help="the cases of one choice alone")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        case = Case(**json.loads(arguments.child[0]))
        child(case, *arguments.child[1:])
        return
    text = " ".join(shared("models", "mixed-13m", "PROVENANCE.md").read_text().split()) * 40
    rows, chance = [], random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, case in enumerate(CASES):
            if case.shape not in arguments.only or (arguments.packed and case.batching != "packed"):
                continue
            if arguments.checkpointing not in (None, case.checkpointing):
                continue
            model = folder / case.shape
            if not model.is_dir():
                write_model(model, case.shape)
            # A little longer than the row may be, so that every row is cut at its full length.
            lengths = [8 * case.length] * 32
            if case.batching == "packed":
                lengths = [
                    chance.randint(60, 8 * case.length) // chance.choice((1, 4)) for _ in lengths
                ]
            rows_of = [{"text": text[:length]} for length in lengths]
            data = write_jsonl(folder / f"data{number}.jsonl", rows_of)
            given = [json.dumps(asdict(case)), str(model), str(data), str(folder / f"run{number}")]
            command = [sys.executable, __file__, "--child", *given]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{case} failed:\n{done.stderr}")
            planned, measured = json.loads(done.stdout.splitlines()[-1])
            off = planned - measured
            good = abs(off) <= max(0.05 * measured, 50e6)
            rows.append(
                {
                    **asdict(case),
                    "planned MB": round(planned / 1e6),
                    "measured MB": round(measured / 1e6),
                    "off MB": round(off / 1e6),
                    "off": f"{off / measured:+.1%}",
                    "verdict": "ok" if good else "miss",
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    print_table(rows)
    print(f"wrote {write_csv('plan', rows)}")


if __name__ == "__main__":
    main()
