"""Which file is mutated, how, and which commands then read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fuzz_binary import GGUF, PICKLE, SAFETENSORS
from fuzz_corpus import RUNS, compare_flags
from fuzz_json import JSON, JSONL, YAML
from fuzz_mutation import BYTES, TEXT, Mutation, Mutator, choose, windows_lines, zipped
from fuzz_template import JINJA, TOKENIZER

ODD_TABLES = ("bomb", "numbers", "nulls", "bytes", "lists", "nested", "times", "escapes", "none")


@dataclass(frozen=True)
class Place:
    """Where a round works."""

    corpus: Path
    copy: Path
    """The copy of the target's folder, with the mutated file."""
    file: Path
    """The mutated file."""
    out: Path
    """A name that is free for the command's result."""


Command = Callable[[Place], tuple[str, ...]]


@dataclass(frozen=True)
class Target:
    """One file of one folder of the corpus."""

    folder: str
    """Copied for each round."""
    file: str
    """Pattern of the files in it of which one is mutated."""
    mutate: Mutator
    commands: tuple[Command, ...]
    compared: bool = True
    """Whether what cannot change the numbers must be taken; not where bytes are compared."""


# Commands -----------------------------------------------------------------------------------------


def _rows(place: Place) -> str:
    return str(place.corpus / "data" / "rows.jsonl")


_TRAIN = ("--steps", "2", "--batch-size", "2", "--max-length", "64")


def _train_on(*flags: str) -> Command:
    def words(place: Place) -> tuple[str, ...]:
        model = ("--model", str(place.corpus / "base"), "--data", str(place.file))
        return ("train", *model, "--out", str(place.out), *_TRAIN, *flags)

    return words


def train_model(place: Place) -> tuple[str, ...]:
    model = ("--model", str(place.copy), "--data", _rows(place))
    return ("train", *model, "--out", str(place.out), *_TRAIN, "--method", "lora")


def train_file(place: Place) -> tuple[str, ...]:
    # A million steps would be a training of a million steps, and no fault.
    return ("train", str(place.file), "--steps", "2", "--out", str(place.out))


def quantize_file(place: Place) -> tuple[str, ...]:
    return ("quantize", str(place.file), "--out", str(place.out))


def plan_file(place: Place) -> tuple[str, ...]:
    return ("plan", str(place.file), "--json")


def resume(place: Place) -> tuple[str, ...]:
    return ("train", "--resume", "--out", str(place.copy))


def evaluate(place: Place) -> tuple[str, ...]:
    return ("eval", str(place.copy), "--data", _rows(place), "--max-length", "64", "--json")


def evaluate_on(place: Place) -> tuple[str, ...]:
    model = (str(place.corpus / "base"), "--data", str(place.file))
    return ("eval", *model, "--max-length", "64", "--json")


def look_at(place: Place) -> tuple[str, ...]:
    model = (str(place.corpus / "base"), str(place.file))
    return ("data", *model, "--max-length", "64", "--html", str(place.out))


def look_with(place: Place) -> tuple[str, ...]:
    return ("data", str(place.copy), _rows(place), "--max-length", "64", "--json")


def evaluate_gguf(place: Place) -> tuple[str, ...]:
    tokenizer = ("--tokenizer", str(place.corpus / "base"))
    return ("eval", str(place.file), "--data", _rows(place), *tokenizer, "--json")


def generate(place: Place) -> tuple[str, ...]:
    return ("generate", str(place.copy), "--prompt", "red lamp", "--max-new-tokens", "4")


def chat(place: Place) -> tuple[str, ...]:
    return ("chat", str(place.copy), "--max-new-tokens", "4")


def merge(place: Place) -> tuple[str, ...]:
    return ("merge", str(place.copy), "--out", str(place.out))


def quantize(place: Place) -> tuple[str, ...]:
    return ("quantize", "--model", str(place.copy), "--out", str(place.out), "--format", "int")


def compress(place: Place) -> tuple[str, ...]:
    return ("compress", "--model", str(place.copy), "--out", str(place.out), "--rank", "6")


def plan(place: Place) -> tuple[str, ...]:
    return ("plan", "--model", str(place.copy), "--json", *_TRAIN[2:])


def convert(place: Place) -> tuple[str, ...]:
    return ("convert", str(place.copy), "--out", str(place.out), "--json")


def dequantise(place: Place) -> tuple[str, ...]:
    return (*convert(place), "--dequantise")


def convert_gguf(place: Place) -> tuple[str, ...]:
    tokenizer = ("--tokenizer", str(place.corpus / "base"))
    return ("convert", str(place.file), "--out", str(place.out), *tokenizer, "--json")


def adopt(place: Place) -> tuple[str, ...]:
    model = ("--model", str(place.corpus / "base"))
    return ("adopt", str(place.copy), *model, "--out", str(place.out))


def adapter_show(place: Place) -> tuple[str, ...]:
    return ("adapter", "show", str(place.copy), "--json")


def adapter_resize(place: Place) -> tuple[str, ...]:
    return ("adapter", "resize", str(place.copy), "--energy", "0.9", "--out", str(place.out))


def adapter_merge(place: Place) -> tuple[str, ...]:
    copy = str(place.copy)
    return ("adapter", "merge", copy, copy, "--how", "svd", "--out", str(place.out))


def adapter_list(place: Place) -> tuple[str, ...]:
    return ("adapter", "list", str(place.copy))


def evaluate_adapter(place: Place) -> tuple[str, ...]:
    base = str(place.corpus / "base")
    return ("eval", base, "--adapter", str(place.copy), "--data", _rows(place), "--json")


_ADAPTERS = (adapter_show, adapter_resize, adapter_merge, evaluate_adapter)


def verify(place: Place) -> tuple[str, ...]:
    folder = place.corpus / "hf"
    return ("verify", str(place.copy), str(folder), "--data", _rows(place), "--json")


def verify_folder(place: Place) -> tuple[str, ...]:
    run = place.corpus / "runs" / "qalora"
    return ("verify", str(run), str(place.copy), "--data", _rows(place), "--json")


def export_to(target: str) -> Command:
    def words(place: Place) -> tuple[str, ...]:
        suffix = ".gguf" if target == "gguf" else ""
        return ("export", str(place.copy), "--to", target, "--out", f"{place.out}{suffix}")

    return words


def runs(place: Place) -> tuple[str, ...]:
    return ("runs", str(place.copy.parent))


def compare(place: Place) -> tuple[str, ...]:
    return ("compare", *compare_flags(place.corpus), "--out", str(place.copy / "out"))


# Targets ------------------------------------------------------------------------------------------


def _csv(data: bytes, rng: Random) -> Mutation:
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    odd = (b'"', b'"a,b', b",,,,,", b"a" * 200_000, b'"\n\n', b"prompt,prompt", b"\0", b"=1+1,x")
    lines[place] = rng.choice(odd)
    return Mutation(b"\n".join(lines), f"line {place + 1}: {lines[place][:20]!r}")


def _parquet(data: bytes, rng: Random) -> Mutation:
    if rng.random() < 0.3:
        odd = rng.choice(ODD_TABLES)
        return Mutation(None, f"{odd}.parquet", instead=f"data/odd/{odd}.parquet")
    return BYTES(data, rng)


_CSV = choose([(3, _csv), (2, TEXT), (1, BYTES), (1, windows_lines)])
_TXT = choose([(3, TEXT), (2, BYTES)])
_METRICS = choose([(3, JSONL), (1, TEXT)])
_READ_DATA = (_train_on(), evaluate_on, look_at)
_SKIPPING = _train_on("--skip-bad-rows")
_READ_BASE = (generate, evaluate, train_model, quantize, compress, plan, export_to("gguf"), chat)
_READ_INT = (generate, evaluate, train_model, plan, export_to("gguf"), export_to("hf"))
_READ_WEIGHTS = tuple(one for one in _READ_BASE if one is not plan)
"""A plan reads the headers of weights alone, and asks for no tensor by its name."""
_READ_INT_WEIGHTS = tuple(one for one in _READ_INT if one is not plan)
_READ_NF4 = (generate, evaluate, train_model, export_to("hf"))
_READ_TENSORS = (generate, evaluate, merge, export_to("hf"))

TARGETS: dict[str, Target] = {
    "data-jsonl": Target("data", "rows.jsonl", JSONL, _READ_DATA),
    "data-chat": Target("data", "chat.jsonl", JSONL, _READ_DATA),
    "data-json": Target("data", "rows.json", JSON, _READ_DATA),
    "data-csv": Target("data", "rows.csv", _CSV, _READ_DATA),
    "data-txt": Target("data", "rows.txt", _TXT, _READ_DATA),
    "data-parquet": Target("data", "rows.parquet", _parquet, _READ_DATA),
    "data-tsv": Target("data", "rows.tsv", _CSV, _READ_DATA),
    "data-arrow": Target("data", "rows.arrow", BYTES, _READ_DATA),
    "data-wide": Target("data", "wide.jsonl", BYTES, _READ_DATA),
    "data-sharegpt": Target("data", "sharegpt.jsonl", JSONL, _READ_DATA),
    "data-pairs": Target("data", "pairs.jsonl", JSONL, _READ_DATA),
    "data-skipped": Target("data", "rows.jsonl", JSONL, (_SKIPPING,), False),
    "data-mixture": Target("data", "mix.yaml", YAML, _READ_DATA),
    "data-jsonl-gz": Target("data", "rows.jsonl.gz", zipped(JSONL), _READ_DATA),
    "data-json-gz": Target("data", "rows.json.gz", zipped(JSON), _READ_DATA),
    "data-csv-gz": Target("data", "rows.csv.gz", zipped(_CSV), _READ_DATA),
    "data-txt-gz": Target("data", "rows.txt.gz", zipped(_TXT), _READ_DATA),
    "yaml-train": Target("settings", "train.yaml", YAML, (train_file,)),
    "yaml-quantize": Target("settings", "quantize.yaml", YAML, (quantize_file,)),
    "yaml-plan": Target("settings", "plan.yaml", YAML, (plan_file,)),
    "config": Target("base", "config.json", JSON, _READ_BASE),
    "generation-config": Target("base", "generation_config.json", JSON, (generate, quantize, chat)),
    "tokenizer": Target("base", "tokenizer.json", TOKENIZER, (*_READ_BASE, look_with)),
    "tokenizer-config": Target("base", "tokenizer_config.json", JSON, (*_READ_BASE, look_with)),
    "template": Target("base", "chat_template.jinja", JINJA, (chat, export_to("ollama"))),
    "template-training": Target("base", "chat_template.jinja", JINJA, (train_model,)),
    "weights": Target("base", "model.safetensors", SAFETENSORS, _READ_WEIGHTS),
    "index": Target("sharded", "model.safetensors.index.json", JSON, _READ_BASE),
    "shards": Target("sharded", "model-*.safetensors", SAFETENSORS, _READ_WEIGHTS),
    "int-config": Target("int", "config.json", JSON, _READ_INT),
    "int-graft-json": Target("int", "graft.json", JSON, _READ_INT),
    "int-weights": Target("int", "model.safetensors", SAFETENSORS, _READ_INT_WEIGHTS),
    "factored-graft-json": Target("factored", "graft.json", JSON, _READ_INT),
    "factored-weights": Target("factored", "model.safetensors", SAFETENSORS, _READ_INT_WEIGHTS),
    "nf4-graft-json": Target("nf4", "graft.json", JSON, _READ_NF4),
    "nf4-weights": Target("nf4", "model.safetensors", SAFETENSORS, _READ_NF4),
    "peft-config": Target("peft", "adapter_config.json", JSON, (adopt,)),
    "peft-weights": Target("peft", "adapter_model.safetensors", SAFETENSORS, (adopt,)),
    "lora-config": Target("peft", "adapter_config.json", JSON, (*_ADAPTERS, adapter_list), False),
    "lora-weights": Target("peft", "adapter_model.safetensors", SAFETENSORS, _ADAPTERS, False),
    "adapter-config": Target("adapter", "adapter_config.json", JSON, (adopt,)),
    "adapter-weights": Target("adapter", "adapter_model.safetensors", SAFETENSORS, (adopt,)),
    "adapter-tokenizer": Target("adapter", "tokenizer.json", TOKENIZER, (adopt,)),
    "adapter-tokenizer-config": Target("adapter", "tokenizer_config.json", JSON, (adopt,)),
    "adapter-generation": Target("adapter", "generation_config.json", JSON, (adopt,)),
    "adapter-template": Target("adapter", "chat_template.jinja", JINJA, (adopt,)),
    "adapter-pickled": Target("adapter-bin", "adapter_model.bin", PICKLE, (adopt,)),
    "adapter-mlx-config": Target("adapter-mlx", "adapter_config.json", JSON, (adopt,)),
    "adapter-mlx-weights": Target("adapter-mlx", "adapters.safetensors", SAFETENSORS, (adopt,)),
    "gguf": Target("gguf", "model.gguf", GGUF, (evaluate_gguf, convert_gguf)),
    "verified": Target("hf", "*.json", JSON, (verify_folder,), False),
    "verified-weights": Target("hf", "model.safetensors", SAFETENSORS, (verify_folder,), False),
    "gptq-config": Target("gptq", "config.json", JSON, (convert,)),
    "gptq-weights": Target("gptq", "model.safetensors", SAFETENSORS, (convert,)),
    "awq-config": Target("awq", "config.json", JSON, (convert,)),
    "awq-weights": Target("awq", "model.safetensors", SAFETENSORS, (convert,)),
    "mlx-config": Target("mlx", "config.json", JSON, (convert,)),
    "mlx-weights": Target("mlx", "model.safetensors", SAFETENSORS, (convert,)),
    "bnb-config": Target("bnb", "config.json", JSON, (convert,)),
    "bnb-weights": Target("bnb", "model.safetensors", SAFETENSORS, (convert,)),
    "fp8-config": Target("fp8", "config.json", JSON, (dequantise,)),
    "fp8-weights": Target("fp8", "model.safetensors", SAFETENSORS, (dequantise,)),
    "compressed-config": Target("compressed", "config.json", JSON, (convert,)),
    "compressed-weights": Target("compressed", "model.safetensors", SAFETENSORS, (convert,)),
    "torchao-weights": Target("torchao", "model.safetensors", SAFETENSORS, (convert, dequantise)),
    "hqq-weights": Target("hqq", "model.safetensors", SAFETENSORS, (convert, dequantise)),
    "hqq-pickled": Target("qmodel", "qmodel.pt", PICKLE, (convert,)),
    "pickled": Target("pickled", "pytorch_model.bin", PICKLE, (convert,)),
    "pickled-legacy": Target("legacy", "pytorch_model.bin", PICKLE, (convert,)),
    "compare-settings": Target("compared", "out/settings.json", JSON, (compare,)),
    "compare-results": Target("compared", "out/results/*.json", JSON, (compare,)),
}
for _method in RUNS:
    _run, _stopped = f"runs/{_method}", f"stopped/{_method}"
    _tensors: tuple[Command, ...] = _READ_TENSORS
    if _method == "qalora":
        _tensors = (*_READ_TENSORS, export_to("gguf"), verify)
    _readers = (*_tensors, runs)
    TARGETS |= {
        f"run-{_method}-config": Target(_run, "config.yaml", YAML, _readers),
        f"run-{_method}-own-adapter": Target(_run, "adapter/graft_adapter.json", JSON, _readers),
        f"run-{_method}-weights": Target(_run, "adapter/*.safetensors", SAFETENSORS, _tensors),
        f"run-{_method}-json": Target(_run, "*.json", JSON, _readers),
        f"state-{_method}": Target(_stopped, "checkpoints/*/state.json", JSON, (resume,)),
        f"resume-{_method}-json": Target(_stopped, "*.json", JSON, (resume, runs)),
        f"resume-{_method}-general": Target(
            _stopped, "general.safetensors", SAFETENSORS, (resume,)
        ),
        f"state-{_method}-tensors": Target(
            _stopped, "checkpoints/*/state.safetensors", SAFETENSORS, (resume,)
        ),
        f"resume-{_method}-config": Target(_stopped, "config.yaml", YAML, (resume,)),
        f"resume-{_method}-metrics": Target(_stopped, "metrics.jsonl", _METRICS, (resume,)),
    }
    if _method in ("lora", "dora"):
        TARGETS[f"run-{_method}-adapter"] = Target(
            _run, "adapter/adapter_config.json", JSON, _readers
        )
    else:
        TARGETS[f"run-{_method}-base"] = Target(_run, "base/graft.json", JSON, _tensors)
        TARGETS[f"run-{_method}-base-weights"] = Target(
            _run, "base/model.safetensors", SAFETENSORS, _tensors
        )
