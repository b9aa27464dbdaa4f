"""Decoding one token at a time beside llama.cpp, on the very weights that graft exports to GGUF.

A Llama shape with random weights, in int4 or int2 (groups of 32) or nf4 on all seven linear layers,
embedding and head in bf16. graft's decoder, graft through transformers' forward, and llama.cpp on
the exported file take turns in fresh processes with the same number of threads, each choosing
greedily. GGUF has no NF4, and holds int2 in the same four bits as int4: beside nf4, llama.cpp reads
the int4 model. The floor is the time of reading every weight once as it is stored (of the
embedding, one row) at the read bandwidth of the same run.

    python benchmarks/decode.py [--shape tiny] [--threads 2] [--tokens 96] [--rounds 3]
    python benchmarks/decode.py --isa avx2 --dtype float32 --format nf4
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _isa
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

PROMPT = list(range(300, 316))
WARM_UP = 4
SLOW_TOKENS = 16
"""Decoded through transformers, which takes ten times as long."""

WHO = ("graft", "graft through transformers", "llama.cpp")
GGUF = "model.gguf"
FORMATS = {"int4": "qalora", "int2": "qalora-2", "int8": "qalora-8", "nf4": "qlora"}
"""By the method whose frozen weights have that format."""


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
    with tempfile.TemporaryDirectory(prefix="graft-decode-") as temporary:
        folder = Path(temporary) / "model"
        given = {name: getattr(arguments, name) for name in ("threads", "dtype")}
        given["folder"] = str(folder)
        write = {"do": "write", "shape": arguments.shape, "format": arguments.format}
        described = run_child(__file__, {**write, **given})
        bandwidth = 0.0
        for _ in range(arguments.rounds):
            measured = run_child(__file__, {"do": "bandwidth", **given})
            bandwidth = max(bandwidth, measured["bytes_per_second"])
            for name in who:
                task = {"do": name, "tokens": arguments.tokens, **given}
                one = run_child(__file__, task)
                if one["other"] > OTHER_LOAD_LIMIT:
                    one = min(one, run_child(__file__, task), key=lambda result: result["other"])
                results[name].append(one)
                print(f"{name}: {1 / summarise(one['seconds']).median:.1f} tokens/s", flush=True)
    _report(results, described["read_bytes"], bandwidth, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1b")
    parser.add_argument("--format", choices=list(FORMATS), default="int4")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    _isa.add_argument(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each contender")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


# In processes of their own ------------------------------------------------------------------------


def _child(do: str, threads: int, folder: str, dtype: str, **options: Any) -> dict[str, Any]:
    torch.set_num_threads(threads)
    if do == "write":
        return _write(Path(folder), **options)
    if do == "bandwidth":
        return {"bytes_per_second": _bandwidth()}
    contenders = {"graft": _graft, "graft through transformers": _transformers}
    step = contenders.get(do, _llama_cpp)(Path(folder), threads, dtype)
    count = SLOW_TOKENS if step.__name__ == "slow" else options["tokens"]
    token = PROMPT[-1]
    for _ in range(WARM_UP):
        token = step(token)
    load, seconds = OtherLoad(), []
    for _ in range(count):
        begin = time.perf_counter()
        token = step(token)
        seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds, "other": load.cores()}


def _write(folder: Path, shape: str, format: str) -> dict[str, Any]:
    """Write a model folder and a GGUF file; return the bytes that a token reads of the former."""
    from _training import graft_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from graft.api.export import export_model
    from graft.model.load import LoadedModel
    from graft.model.save import save_model

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["</s>", *alphabet, "th"])}
    bytes_only = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="</s>")
    tokenizer.save_pretrained(folder.with_name("tokenizer"))
    narrow, exported = torch.bfloat16, "int4" if format == "nf4" else format
    source = folder.with_name("tokenizer")
    for name in dict.fromkeys((exported, format)):
        model = graft_model(SHAPES[shape], FORMATS[name])
        saved = folder if name == format else folder.with_name(name)
        save_model(LoadedModel(model, tokenizer, source, narrow, narrow), saved)
        if name == exported:
            export_model(saved, "gguf", folder.with_name(GGUF))
    parameters = dict(model.named_parameters())
    del parameters["model.embed_tokens.weight"]
    return {"read_bytes": sum(parameter.nbytes for parameter in parameters.values())}


def _bandwidth(megabytes: int = 512) -> float:
    """Return bytes per second of a sum over int64, at the best of several times."""
    numbers = torch.ones(megabytes << 17, dtype=torch.int64)
    seconds = []
    for _ in range(12):
        begin = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begin)
    return numbers.nbytes / min(seconds)


def _graft(folder: Path, threads: int, dtype: str) -> Callable[[int], int]:
    from graft.model.load import load_model
    from graft.model.running.decode import Decoder, why_not_native

    model = load_model(str(folder), dtype=dtype, device="cpu").model
    reason = why_not_native(model, 1024)
    if reason is not None:
        raise RuntimeError(reason)
    decoder = Decoder(model, 1024)
    decoder.start({0: torch.tensor([*PROMPT, 0])})

    def fast(token: int) -> int:
        return int(decoder.step({0: token}).argmax())

    return fast


def _transformers(folder: Path, threads: int, dtype: str) -> Callable[[int], int]:
    from transformers import DynamicCache

    from graft.model.load import load_model

    model = load_model(str(folder), dtype=dtype, device="cpu").model
    cache = DynamicCache()

    @torch.no_grad()
    def slow(token: int, *before: int) -> int:
        ids = torch.tensor([[*before, token]])
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(logits.logits[0, -1].argmax())

    slow(PROMPT[-1], *PROMPT[:-1])
    return slow


def _llama_cpp(folder: Path, threads: int, dtype: str) -> Callable[[int], int]:
    import llama_cpp
    import numpy

    peer = llama_cpp.Llama(
        str(folder.with_name(GGUF)),
        n_ctx=1024,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    peer.eval(PROMPT)

    def fast(token: int) -> int:
        peer.eval([token])
        logits = llama_cpp.llama_get_logits(peer.ctx)
        return int(numpy.ctypeslib.as_array(logits, shape=(peer.n_vocab(),)).argmax())

    return fast


# The table ----------------------------------------------------------------------------------------


def _report(
    results: dict[str, list[dict[str, Any]]],
    read_bytes: int,
    bandwidth: float,
    arguments: argparse.Namespace,
) -> None:
    from graft.kernels.backend.native_library import instructions

    floor = read_bytes / bandwidth
    print(
        f"\nshape {arguments.shape}, {arguments.format} in groups of {GROUP_SIZE}, "
        f"{arguments.dtype}, {instructions()}, {arguments.threads} threads: a token reads "
        f"{read_bytes / 1e6:.0f} MB, at {bandwidth / 1e9:.1f} GB/s in {floor * 1e3:.2f} ms "
        f"({1 / floor:.1f} tokens/s)\n"
    )
    found = {
        name: summarise([second for one in several for second in one["seconds"]])
        for name, several in results.items()
    }
    rows: list[dict[str, object]] = []
    for name, summary in found.items():
        peer = found.get("llama.cpp")
        rows.append(
            {
                "who": name,
                "tokens/s": f"{1 / summary.median:.2f}",
                "ms/token": f"{summary.median * 1e3:.2f}",
                "min ms": f"{summary.minimum * 1e3:.2f}",
                "spread": f"{summary.spread:.0%}",
                "tokens": summary.count,
                "GB/s": f"{read_bytes / summary.median / 1e9:.1f}",
                "of floor": f"{floor / summary.median:.2f}",
                "over llama.cpp": "" if peer is None else f"{peer.median / summary.median:.2f}",
                "other load": load_text(max(one["other"] for one in results[name])),
            }
        )
    print_table(rows)
    ours = found["graft"].median
    peers = [found[name].median for name in ("llama.cpp",) if name in found]
    good = floor / ours >= 0.75 and all(ours <= peer for peer in peers)
    print("at least 0.75 of the floor, and as fast as llama.cpp: " + ("yes" if good else "no"))
    for row in rows:
        row |= {name: getattr(arguments, name) for name in ("shape", "format", "dtype")}
        row |= {"read GB/s": f"{bandwidth / 1e9:.1f}"}
        row |= {"floor ms": f"{floor * 1e3:.2f}", "threads": arguments.threads}
    name = f"decode-{arguments.shape}-{arguments.format}-{arguments.dtype}"
    print(f"wrote {write_csv(name, rows)}")


if __name__ == "__main__":
    main()
