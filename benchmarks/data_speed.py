"""How long rows take to be read and encoded, and from the cache; what memory that takes.

Rows are those of ../shared/data, repeated with a number in each so that no two are equal:
prompt and completion (E2E), conversations (a ChatML-like template) and long texts (WikiText).
Each measurement is a process of its own, with a cache of its own.

    python benchmarks/data_speed.py --rows 200000 --kinds prompt,messages,text
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from _common import e2e_rows, shared, write_csv

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' }}{% endif %}"
)


def rows_of(kind: str, count: int) -> Iterator[dict[str, object]]:
    """Yield rows of a kind, each with its number in it."""
    base = e2e_rows("train")
    if kind == "prompt":
        for number in range(count):
            row = base[number % len(base)]
            yield {"prompt": f"{number}: {row['prompt']}", "completion": row["completion"]}
    elif kind == "messages":
        for number in range(count):
            row = base[number % len(base)]
            question = {"role": "user", "content": f"{number}: {row['prompt']}"}
            yield {"messages": [question, {"role": "assistant", "content": row["completion"]}]}
    else:
        path = shared("data", "wikitext-2", "wikitext_1000_paragraphs.jsonl.gz")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        texts = [text for text in texts if text.strip()]
        for number in range(count):
            pair = texts[number % len(texts)], texts[(7 * number + 3) % len(texts)]
            yield {"text": f"{number}. {pair[0]}\n{pair[1]}"}


def measure(path: str, kind: str) -> dict[str, object]:
    """Load a file as training does; return the seconds, the counts and the memory."""
    from transformers import AutoTokenizer

    from graft.data.config import DataConfig
    from graft.data.load import load_train_and_eval

    tokenizer = AutoTokenizer.from_pretrained(shared("models", "mixed-13m"))
    if kind == "messages":
        tokenizer.chat_template = CHATML
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before_processor = time.process_time()
    begin = time.perf_counter()
    training, held_out = load_train_and_eval(DataConfig(data=path), tokenizer, 1024, 0)
    seconds = time.perf_counter() - begin
    user = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = sum(used.ru_utime + used.ru_stime for used in user) - before_processor
    tokens = training.total_tokens + held_out.total_tokens
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "kind": kind,
        "rows": len(training.examples) + len(held_out.examples),
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "rows_per_second": round((len(training.examples) + len(held_out.examples)) / seconds),
        "tokens_per_second": round(tokens / seconds),
        "mib_beside_the_process": used >> 10,
        "mib_of_a_worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10,
    }


def measured(path: Path, kind: str, cache: Path) -> dict[str, object]:
    """Measure in a process of its own."""
    found = subprocess.run(
        [sys.executable, __file__, "--measure", str(path), "--kinds", kind],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "2"},
        check=True,
        stdout=subprocess.PIPE,
    )
    row: dict[str, object] = json.loads(found.stdout)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--kinds", default="prompt,messages,text")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.kinds)))
        return
    results = []
    with tempfile.TemporaryDirectory(prefix="data_speed_") as folder:
        for kind in given.kinds.split(","):
            path = Path(folder, f"{kind}.jsonl")
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows_of(kind, given.rows))
            for run in ("first", "cached"):
                row = {"run": run, "mib_of_the_file": path.stat().st_size >> 20}
                results.append(row | measured(path, kind, Path(folder, "cache")))
                print(results[-1], flush=True)
            path.unlink()
    write_csv("data_speed", results)


if __name__ == "__main__":
    main()
