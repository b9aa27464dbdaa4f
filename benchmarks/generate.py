"""Prompts, and several sequences at once, beside llama.cpp on the weights that graft exports.

A Llama shape with random weights, int4 (or --format) in groups of 32 on all seven linear layers,
embedding and head in bf16, exported to GGUF. Three numbers of each contender, in fresh processes
that take turns: tokens/s of a prompt of 512, of one sequence, and of 8 that go on together
(llama.cpp: one llama_batch with a token of each). And how far its logits are from those of graft in
float32: the mean Kullback-Leibler divergence in nats. `graft q8` and `graft q8_token` have
--activations: inputs of 8 bits, in blocks of 32 as llama.cpp's are or with one scale a token.

    python benchmarks/generate.py [--shape tiny] [--threads 2] [--isa avx2 --dtype float32]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _isa
import numpy as np
import torch
from _common import write_csv
from _shapes import GROUP_SIZE, SHAPES
from _timing import (
    OTHER_LOAD_LIMIT,
    OtherLoad,
    load_text,
    print_table,
    run_child,
    summarise,
)

WHO = ("graft", "graft q8", "graft q8_token", "llama.cpp")
GGUF = "model.gguf"
LENGTH = 512
"""Of the prompt whose speed is measured."""
SHORT = 16
"""Tokens that each sequence has before its first step is measured."""
TOKENS = 24
WARM_UP = 3


class Runner(NamedTuple):
    """A contender that holds a model: what is timed of it."""

    prompt: Callable[[list[int]], object]
    begin: Callable[[list[list[int]]], object]
    step: Callable[[Sequence[int]], np.ndarray]
    """One more token of each sequence; float32 [sequences, vocabulary]."""


def main() -> None:
    arguments = _arguments()
    if arguments.child is not None:
        _isa.limit()
        print(json.dumps(_child(**json.loads(arguments.child))))
        return
    _isa.choose(arguments.isa)
    who = _isa.comparable(WHO)
    torch.set_num_threads(arguments.threads)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in who}
    with tempfile.TemporaryDirectory(prefix="graft-generate-") as temporary:
        folder = Path(temporary) / "model"
        given = {name: getattr(arguments, name) for name in ("threads", "sequences")}
        given["folder"] = str(folder)
        run_child(
            __file__, {"do": "write", "shape": arguments.shape, "format": arguments.format, **given}
        )
        exact = {"do": "graft", "dtype": "float32", "logits": str(folder / "exact.npy"), **given}
        run_child(__file__, exact)
        for _ in range(arguments.rounds):
            for name in who:
                task = {"do": name, "dtype": arguments.dtype, **given}
                task["logits"] = str(folder / f"{name}.npy")
                one = run_child(__file__, task)
                if one["other"] > OTHER_LOAD_LIMIT:
                    one = min(one, run_child(__file__, task), key=lambda result: result["other"])
                results[name].append(one)
                print(f"{name}: a round took {one['seconds']:.0f} s", flush=True)
        distances = {
            name: _divergence(folder / "exact.npy", folder / f"{name}.npy") for name in who
        }
    _report(results, distances, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--format", choices=("int2", "int4", "int8"), default="int4")
    _isa.add_argument(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each contender")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _divergence(exact: Path, other: Path) -> float:
    """Return the mean KL divergence, in nats, of what the second predicts from the first."""
    p, q = (torch.from_numpy(np.load(file)).double().log_softmax(-1) for file in (exact, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


# In processes of their own ------------------------------------------------------------------------


def _child(do: str, threads: int, folder: str, sequences: int, **options: Any) -> dict[str, Any]:
    torch.set_num_threads(threads)
    if do == "write":
        import decode

        return decode._write(Path(folder), options["shape"], options["format"])
    begin = time.perf_counter()
    contender = _llama_cpp if do == "llama.cpp" else _graft
    activations = do.partition(" ")[2] or "float"
    runner = contender(Path(folder), threads, sequences, options["dtype"], activations)
    tokens = np.random.default_rng(0).integers(3, 259, LENGTH).tolist()
    runner.prompt(tokens[:SHORT])  # what is made ready once
    load = OtherLoad()
    found: dict[str, Any] = {"prompt": [_seconds(lambda: runner.prompt(tokens)) for _ in range(2)]}
    for count in (1, sequences):
        texts = [tokens[number * 7 : number * 7 + SHORT] for number in range(count)]
        runner.begin(texts)
        given = [7 + number for number in range(count)]
        logits = runner.step(given)
        for _ in range(WARM_UP):
            runner.step(given)
        found[str(count)] = [
            _seconds(lambda given=given: runner.step(given)) for _ in range(TOKENS)
        ]
    np.save(options["logits"], logits)
    return {**found, "other": load.cores(), "seconds": time.perf_counter() - begin}


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _graft(folder: Path, threads: int, sequences: int, dtype: str, activations: str) -> Runner:
    from graft.layers.activations import compute_with
    from graft.model.load import load_model
    from graft.model.running.decode import Decoder, why_not_native

    model = load_model(str(folder), dtype=dtype, device="cpu").model
    compute_with(model, activations)  # type: ignore[arg-type]
    reason = why_not_native(model, LENGTH + TOKENS)
    if reason is not None:
        raise RuntimeError(reason)
    decoder = Decoder(model, LENGTH + TOKENS, sequences)

    def prompt(tokens: list[int]) -> object:
        decoder.start({0: torch.tensor(tokens)})
        return decoder.step({0: tokens[-1]})

    def begin(texts: list[list[int]]) -> object:
        decoder.start({number: torch.tensor(text) for number, text in enumerate(texts)})
        return decoder.step({number: text[-1] for number, text in enumerate(texts)})

    def step(tokens: Sequence[int]) -> np.ndarray:
        return decoder.step(dict(enumerate(tokens))).numpy()

    return Runner(prompt, begin, step)


def _llama_cpp(folder: Path, threads: int, sequences: int, dtype: str, activations: str) -> Runner:
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(folder.with_name(GGUF)).encode(), llama_cpp.llama_model_default_params()
    )
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = sequences * 1024
    settings.n_batch = settings.n_ubatch = LENGTH
    settings.n_seq_max = sequences
    settings.n_threads = settings.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(LENGTH, 0, sequences)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    lengths = [0] * sequences

    def run(rows: list[tuple[int, int, int, bool]]) -> None:
        """Rows of (token, position, sequence, whether its logits are wanted)."""
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0], batch.logits[at] = sequence, wanted
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(context)

    def begin(texts: list[list[int]]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        for number, text in enumerate(texts):
            last = len(text) - 1
            run([(token, at, number, at == last) for at, token in enumerate(text)])
            lengths[number] = len(text)

    def step(tokens: Sequence[int]) -> np.ndarray:
        run([(token, lengths[number], number, True) for number, token in enumerate(tokens)])
        for number in range(len(tokens)):
            lengths[number] += 1
        rows = [llama_cpp.llama_get_logits_ith(context, at) for at in range(len(tokens))]
        return np.stack([np.ctypeslib.as_array(row, shape=(vocabulary,)).copy() for row in rows])

    step.quiet = quiet  # type: ignore[attr-defined]  # llama.cpp calls it as long as it lives
    return Runner(lambda tokens: begin([tokens]), begin, step)


# The table ----------------------------------------------------------------------------------------


def _report(
    results: dict[str, list[dict[str, Any]]],
    distances: dict[str, float],
    arguments: argparse.Namespace,
) -> None:
    print(
        f"\nshape {arguments.shape}, {arguments.format} in groups of {GROUP_SIZE}, "
        f"{arguments.dtype}, {arguments.threads} threads\n"
    )
    works = {"prompt": LENGTH, "1": 1, str(arguments.sequences): arguments.sequences}

    def median(name: str, work: str) -> float:
        return summarise([s for one in results[name] for s in one[work]]).median

    rows: list[dict[str, object]] = []
    for name, rounds in results.items():
        row: dict[str, object] = {"who": name}
        for work, tokens in works.items():
            title = f"prompt {LENGTH}" if work == "prompt" else f"{work} at once"
            row[f"{title}, tokens/s"] = f"{tokens / median(name, work):.1f}"
            if "llama.cpp" in results:
                row[f"{title}, over llama.cpp"] = (
                    f"{median('llama.cpp', work) / median(name, work):.2f}"
                )
        row["KL to float32"] = f"{distances[name]:.1e}"
        row["other load"] = load_text(max(one["other"] for one in rounds))
        rows.append(row)
    print_table(rows)
    for row in rows:
        row |= {name: getattr(arguments, name) for name in ("shape", "format", "dtype", "threads")}
    print(f"wrote {write_csv(f'generate-{arguments.shape}', rows)}")


if __name__ == "__main__":
    main()
