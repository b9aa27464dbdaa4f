"""Training steps on packed rows beside the same steps on padded ones, in pairs.

Both ways see the same batches of the same model in one process, one step of either in turn; the
tokens per second are those of the rows, without padding. `mean/longest` is the mean row over the
longest of its batch, `padding` the share of the padded tokens that are none. The data are real:
GSM8K, the seed tasks of Alpaca, and those together with all chats (`instruct`).

    python benchmarks/packing.py [--models mixed-13m 0.1b] [--data gsm8k] [--methods lora]
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from _common import RESULTS, shared, write_csv
from _shapes import ALPHA, RANK, SHAPES
from _timing import OtherLoad, print_table
from _training import graft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.data.batches import Batch, collate, pack
from graft.data.examples import Example
from graft.data.sampler import BatchSampler, measure_batches
from graft.data.storage.store import facts_of
from graft.formats.registry import make_format
from graft.model.load import load_model
from graft.model.running.attention import use_own_attention
from graft.model.running.memory import reuse_freed_memory
from graft.model.running.packing import check_packing
from graft.model.running.pointwise import use_own_pointwise
from graft.model.targets import freeze_layers, select_targets
from graft.objectives.next_token import NEXT_TOKEN

FORMATS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "lora": None,
    "qlora": ("nf4", {"double_quant": True}),
    "qalora": ("int", {"bits": 4}),
    "merge_aware": ("latent", {"bits": 4}),
}
BATCH_SIZE = 16
MAX_LENGTH = {"mixed-13m": 512, "stories260k": 512, "babyllama-361-1m": 512}


def conversations(name: str) -> Iterator[tuple[str, str]]:
    """Yield what each row of a file of chats asks, and the last answer."""
    for row in read(shared("data", "instruct", name)):
        *before, last = [message["content"] for message in row["messages"]]
        yield "\n".join(before), last


def seed_tasks() -> Iterator[tuple[str, str]]:
    """Yield what each seed task asks, and its first answer."""
    for row in read(shared("data", "instruct", "seed_tasks_175.jsonl.gz")):
        given = row["instances"][0]
        yield f"{row['instruction']}\n{given['input']}".strip(), given["output"]


def rows_of(data: str) -> list[tuple[str, str]]:
    """Return (prompt, answer) of every row of a data set."""
    if data == "gsm8k":
        rows = read(shared("data", "gsm8k", "train.jsonl.gz"))
        return [(row["question"], row["answer"]) for row in rows]
    if data == "seed_tasks":
        return list(seed_tasks())
    files = sorted(shared("data", "instruct").glob("*_messages.jsonl.gz"))
    names = [file.name for file in files] + ["messages_openai_chat.jsonl.gz"]
    return [*seed_tasks(), *itertools.chain.from_iterable(map(conversations, names))]


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def encoded(rows: Sequence[tuple[str, str]], model: Path, most: int) -> list[Example]:
    """Return rows as tokens, of which the answers' are trained."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = []
    for prompt, answer in rows:
        asked, given = (
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for text in (prompt + "\n", answer)
        )
        ids = ([tokenizer.bos_token_id or 0] + asked)[: most - 1] + given
        targets = [False] * min(len(asked) + 1, most - 1) + [True] * len(given)
        examples.append(Example(ids[:most], targets[:most], "benchmark"))
    return examples


def trainable(model: str, method: str) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    """Return a model as `graft.finetune` has it before the first step, and what trains in it."""
    torch.manual_seed(0)
    if model in SHAPES:
        built = graft_model(SHAPES[model], method)
    else:
        wanted = FORMATS[method]
        weight_format = None if wanted is None else make_format(*wanted)
        folder = str(shared("models", model))
        built = load_model(folder, weight_format=weight_format, dtype="bfloat16").model
        freeze_layers(built, select_targets(built, ()))
    use_own_attention(built)
    check_packing(built)
    config = AdapterConfig(method=method, rank=RANK, alpha=ALPHA)
    attach_adapter(built, select_targets(built, ()), config.resolved(4))
    use_own_pointwise(built)
    return built.train(), adapter_parameters(built, "default")


@dataclass(frozen=True)
class Result:
    model: str
    data: str
    method: str
    mean_over_longest: float
    padding: float
    padded_tokens_per_second: float
    packed_tokens_per_second: float
    ratio: float
    """Median over the pairs of steps."""
    busy_ratio: float
    """The same of the cores' time, which hangs less on what else the machine does."""
    fixed_share: float
    """Of a packed step: what it takes for a batch of a few tokens."""
    other_load: float


def measure(model: str, data: str, method: str, seconds: float) -> Result:
    """Take pairs of steps for about so many seconds."""
    source = shared("models", model if model not in SHAPES else "mixed-13m")
    examples = encoded(rows_of(data), source, MAX_LENGTH.get(model, 512))
    built, parameters = trainable(model, method)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)

    def step(batch: Batch) -> tuple[float, float]:
        begin, busy = time.perf_counter(), time.process_time()
        loss, _ = NEXT_TOKEN.loss(built, batch)
        (loss / batch.targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 0.01)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - begin, time.process_time() - busy

    sampler = BatchSampler(len(examples), BATCH_SIZE, seed=0)
    ways: dict[str, Callable[[list[Example]], Batch]] = {"padded": collate, "packed": pack}
    for way in ways.values():
        step(way([examples[row] for row in next(sampler)]))  # warm up
    short = [Example(one.input_ids[:2], [False, True], "") for one in examples[:BATCH_SIZE]]
    fixed = statistics.median(step(pack(short))[1] for _ in range(5))
    tokens, spent, busy = 0, dict.fromkeys(ways, 0.0), 0.0
    ratios, busy_ratios, shares = [], [], []
    load, end = OtherLoad(), time.perf_counter() + seconds
    while time.perf_counter() < end or len(ratios) < 4:
        rows = [examples[row] for row in next(sampler)]
        order = list(ways) if len(ratios) % 2 else list(reversed(ways))
        taken = {way: step(ways[way](rows)) for way in order}
        lengths = facts_of(rows).lengths
        tokens += int(lengths.sum())
        shares.append(float(lengths.mean() / lengths.max()))
        clock, cores = zip(taken["padded"], taken["packed"], strict=True)
        ratios.append(clock[0] / clock[1])
        busy_ratios.append(cores[0] / cores[1])
        busy += cores[1]
        for way, one in taken.items():
            spent[way] += one[0]
    sampler = BatchSampler(len(examples), BATCH_SIZE, seed=0)
    sizes = measure_batches(sampler, facts_of(examples).lengths, len(ratios) + 2)
    return Result(
        model=model,
        data=data,
        method=method,
        mean_over_longest=round(statistics.mean(shares), 2),
        padding=round(sizes.padding, 2),
        padded_tokens_per_second=round(tokens / spent["padded"]),
        packed_tokens_per_second=round(tokens / spent["packed"]),
        ratio=round(statistics.median(ratios), 2),
        busy_ratio=round(statistics.median(busy_ratios), 2),
        fixed_share=round(fixed * len(ratios) / busy, 2),
        other_load=round(load.cores(), 2),
    )


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw the ratios, and what padding alone would let one expect."""
    figure, axes = plt.subplots(figsize=(9, 1 + 0.3 * len(results)), layout="constrained")
    names = [f"{one.model}, {one.data}, {one.method}" for one in results]
    axes.barh(names, [one.ratio for one in results], color="#4477aa")
    for place, one in enumerate(results):
        expected = 1 / (1 - one.padding)
        axes.plot([expected, expected], [place - 0.4, place + 0.4], color="#bb5566", linewidth=2)
        axes.text(one.ratio, place, f" {one.ratio:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("tokens of rows per second, packed over padded (red: padded over real tokens)")
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["stories260k", "mixed-13m", "0.1b"])
    parser.add_argument("--data", nargs="*", default=["gsm8k", "seed_tasks", "instruct"])
    parser.add_argument("--methods", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    reuse_freed_memory()
    results = []
    for case in itertools.product(arguments.models, arguments.data, arguments.methods):
        results.append(measure(*case, arguments.seconds))
        print(json.dumps(asdict(results[-1])), flush=True)
    rows = [asdict(one) for one in results]
    print_table(rows)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "packing.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw(results, RESULTS / "packing.png")
    print(f"wrote {write_csv('packing', rows)}")


if __name__ == "__main__":
    main()
