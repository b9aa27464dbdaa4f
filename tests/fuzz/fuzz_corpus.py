"""The sound files that are mutated: tiny random models, and all that graft reads and writes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graft.cli.main import main

_WORDS = "red green blue lamp chair table oak steel light heavy small large the is a of and".split()
_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RUNS = {
    "lora": ("--method", "lora", "--dropout", "0.1"),
    "qalora": ("--method", "qalora", "--group-size", "32"),
    "merge_aware": ("--method", "merge_aware", "--group-size", "32"),
    "dora": ("--method", "lora", "--dora"),
    "affine": ("--method", "affine", "--group-size", "32"),
}
SHORT = ("--steps", "4", "--batch-size", "2", "--max-length", "64")


SMALL = ("lora", "qalora")
"""The runs of a short campaign, which has no comparison either."""


def build_corpus(folder: Path, small: bool = False) -> None:
    """Write everything into a new folder. It trains, so a process that forks must not call it."""
    folder.mkdir()
    _base(folder / "base")
    _sharded(folder / "base", folder / "sharded")
    _data(folder / "data")
    for method in SMALL if small else RUNS:
        _run(folder, method)
    base, run = str(folder / "base"), str(folder / "runs" / "qalora")
    shape = ("--group-size", "32")
    _graft("quantize", "--model", base, "--out", str(folder / "int"), *shape, "--format", "int")
    _graft("quantize", "--model", base, "--out", str(folder / "nf4"), "--format", "nf4")
    _graft("compress", "--model", base, "--out", str(folder / "factored"), "--rank", "6")
    (folder / "gguf").mkdir()
    _graft("export", run, "--to", "gguf", "--out", str(folder / "gguf" / "model.gguf"))
    _graft("export", run, "--to", "hf", "--out", str(folder / "hf"))
    _graft("export", str(folder / "runs" / "lora"), "--to", "peft", "--out", str(folder / "peft"))
    _foreign(folder)
    _adapters(folder)
    _pickled(folder)
    _settings(folder)
    if not small:
        _compare(folder)


def _graft(*words: str) -> None:
    if (status := main(words)) != 0:
        raise RuntimeError(f"graft {' '.join(words)} ended with {status}")


def sentence(number: int) -> str:
    return " ".join(_WORDS[(number * step + step) % len(_WORDS)] for step in range(1, 7))


def _base(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence(number) for number in range(50)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>"
    )
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.1,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, do_sample=True, temperature=0.7, top_p=0.9, max_length=40
    )
    model.save_pretrained(folder)


def _sharded(base: Path, folder: Path) -> None:
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = list(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _data(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    rows = [{"prompt": sentence(n), "completion": sentence(n + 1)} for n in range(12)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines)
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in rows
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (folder / "rows.json").write_text(json.dumps(rows))
    table = io.StringIO()
    writer = csv.DictWriter(table, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(rows)
    (folder / "rows.csv").write_text(table.getvalue())
    (folder / "rows.txt").write_text("\n\n".join(row["prompt"] for row in rows))
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.txt"):
        packed = gzip.compress((folder / name).read_bytes(), mtime=0)
        (folder / f"{name}.gz").write_bytes(packed)
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    _more_data(folder, rows)
    odd = folder / "odd"
    odd.mkdir()
    dictionary = pa.DictionaryArray.from_arrays(
        pa.array([0], pa.int8()).take(pa.array([0] * 20_000_000)), pa.array(["a long text " * 20])
    )
    pq.write_table(pa.table({"text": dictionary}), odd / "bomb.parquet")
    columns: dict[str, Any] = {
        "numbers": {"prompt": [1, 2], "completion": [1.5, 2.5]},
        "nulls": {"prompt": pa.nulls(3), "completion": pa.nulls(3)},
        "bytes": {"prompt": [b"\xff\x00", b"a"], "completion": [b"a", b"b"]},
        "lists": {"prompt": [["a"], ["b", "c"]], "completion": [[], None]},
        "nested": {"messages": [[{"role": 1, "content": None}], None]},
        "times": {"text": pa.array([1, 2], pa.timestamp("ns"))},
        "escapes": {"\x1b[31m": ["a"], "": ["b"]},
        "none": {},
    }
    for name, one in columns.items():
        pq.write_table(pa.table(one), odd / f"{name}.parquet")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(twice, odd / "twice.parquet")


def _more_data(folder: Path, rows: list[dict[str, str]]) -> None:
    """Write the same rows in further formats and layouts, and mixtures of them."""
    import pyarrow as pa

    (folder / "rows.tsv").write_text(
        "question\tanswer\n" + "".join("\t".join(row.values()) + "\n" for row in rows)
    )
    wide = "".join(json.dumps(row) + "\n" for row in rows).encode("utf-16")
    (folder / "wide.jsonl").write_bytes(wide)
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    talks = [
        {
            "conversations": [
                {"from": "human", "value": row["prompt"][:12]},
                {"from": "gpt", "value": row["completion"][:12]},
            ],
            "system": "",
            "tools": "[]",
        }
        for row in rows
    ]
    (folder / "sharegpt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in rows
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "mix.yaml").write_text(
        "- data: rows.jsonl\n  weight: 2\n- data: rows.csv\n  columns: {prompt: prompt, "
        "completion: completion}\n- data: rows.tsv\n  data_format: tsv\n  weight: 0.5\n"
    )


def _run(folder: Path, method: str) -> None:
    """Write the run, and the same run as it was after step 2."""
    run = folder / "runs" / method
    run.parent.mkdir(exist_ok=True)
    data = ("--data", str(folder / "data" / "rows.jsonl"), "--save-every", "2")
    model = ("--model", str(folder / "base"), "--out", str(run))
    _graft("train", *model, *data, *SHORT, *RUNS[method])
    stopped = folder / "stopped" / method
    shutil.copytree(run, stopped)
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(stopped / "plots", ignore_errors=True)
    shutil.rmtree(stopped / "checkpoints" / "step-00000004")
    shutil.rmtree(stopped / "adapter")
    status = json.loads((stopped / "status.json").read_text())
    status |= {"state": "running", "step": 2, "until": None}
    (stopped / "status.json").write_text(json.dumps(status))
    for file in stopped.glob("report.*"):
        file.unlink()


def _foreign(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))
    from foreign import awq_layer, foreign_folder, gptq_layer, mlx_layer, nf4_layer
    from foreign_kinds import (
        DEEPSEEK,
        HQQ,
        blocks,
        fp8_layer,
        hqq_described,
        hqq_encoded,
        packed_layer,
        packed_settings,
        torchao_folder,
        torchao_intx,
    )

    base = folder / "base"
    shape: dict[str, Any] = {"bits": 4, "group_size": 32}
    gptq = {"quant_method": "gptq", **shape, "desc_act": False}
    awq = {"quant_method": "awq", **shape, "version": "gemm", "zero_point": True}
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    foreign_folder(base, folder / "gptq", gptq, gptq_layer(4, 32))
    foreign_folder(base, folder / "awq", awq, awq_layer(32))
    layer = mlx_layer(4, 32, torch.float16)
    foreign_folder(base, folder / "mlx", shape, layer, key="quantization")
    foreign_folder(base, folder / "bnb", nf4, nf4_layer)
    deepseek = fp8_layer(blocks(48, 40), "weight_scale_inv")
    foreign_folder(base, folder / "fp8", DEEPSEEK, deepseek)
    packed = packed_settings(4, symmetric=False)
    foreign_folder(base, folder / "compressed", packed, packed_layer(4, symmetric=False))
    torchao_folder(base, folder / "torchao", torchao_intx, lambda metadata, tensors: None)
    hqq: dict[str, Any] = {}

    def described(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        hqq[name], _ = hqq_described(weight, 4)
        return {part: hqq_encoded(value) for part, value in hqq[name].items()}

    foreign_folder(base, folder / "hqq", HQQ, described)
    shutil.copytree(base, folder / "qmodel", ignore=shutil.ignore_patterns("*.safetensors"))
    for key, tensor in load_file(base / "model.safetensors").items():
        module, _, part = key.rpartition(".")
        if module not in hqq or part != "weight":
            hqq.setdefault(module, {})[part] = tensor
    torch.save(hqq, folder / "qmodel" / "qmodel.pt")


def _pickled(folder: Path) -> None:
    tensors = load_file(folder / "base" / "model.safetensors")
    for name, zipped in (("pickled", True), ("legacy", False)):
        shutil.copytree(folder / "base", folder / name)
        (folder / name / "model.safetensors").unlink()
        file = folder / name / "pytorch_model.bin"
        torch.save(tensors, file, _use_new_zipfile_serialization=zipped)


def _settings(folder: Path) -> None:
    place = folder / "settings"
    place.mkdir()
    base, data = str(folder / "base"), str(folder / "data" / "rows.jsonl")
    train = {"model": base, "data": data, "steps": 2, "batch_size": 2, "max_length": 64}
    train |= {"method": "qalora", "rank": 4, "group_size": 16, "learning_rate": 1e-3}
    train |= {"targets": ["q_proj", "v_proj"], "seed": 1, "eval_fraction": 0.2, "grad_accum": 2}
    quantize = {"model": base, "format": "int", "bits": 3, "group_size": 16, "solver": "rtn"}
    plan = {"model": base, "method": "lora", "rank": 4, "batch_size": 2, "max_length": 64}
    for name, values in (("train", train), ("quantize", quantize), ("plan", plan)):
        (place / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def _compare(folder: Path) -> None:
    (folder / "compared").mkdir()
    out = folder / "compared" / "out"
    _graft("compare", *compare_flags(folder), "--out", str(out))


def compare_flags(corpus: Path) -> tuple[str, ...]:
    """Return the flags of the comparison whose folder is in the corpus."""
    model = ("--model", str(corpus / "base"), "--data", str(corpus / "data" / "rows.jsonl"))
    return (*model, "--contenders", "base", "lora", *SHORT)


def _adapters(folder: Path) -> None:
    """Write an adapter with embeddings and a tokenizer, the same pickled, and one of mlx-lm."""
    whole, config = folder / "adapter", "adapter_config.json"
    shutil.copytree(folder / "peft", whole)
    (whole / "graft_adapter.json").unlink()
    settings = json.loads((whole / config).read_text())
    more = {"trainable_token_indices": {"embed_tokens": [3, 5]}, "modules_to_save": ["norm"]}
    (whole / config).write_text(json.dumps(settings | more))
    low_rank = load_file(whole / "adapter_model.safetensors")
    tokens = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    beside = {tokens: torch.randn(2, 64), "base_model.model.model.norm.weight": torch.rand(64)}
    save_file(low_rank | beside, whole / "adapter_model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(folder / "base" / name, whole / name)
    (whole / "chat_template.jinja").write_text(_TEMPLATE + "\n")
    shutil.copytree(whole, folder / "adapter-bin")
    (folder / "adapter-bin" / "adapter_model.safetensors").unlink()
    torch.save(low_rank | beside, folder / "adapter-bin" / "adapter_model.bin")
    other = folder / "adapter-mlx"
    other.mkdir()
    names = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
    turned = {
        key.removeprefix("base_model.model.").removesuffix(part) + name: tensor.T.contiguous()
        for key, tensor in low_rank.items()
        for part, name in names.items()
        if key.endswith(part)
    }
    save_file(turned, other / "adapters.safetensors")
    update = {"rank": settings["r"], "scale": 2.0, "dropout": 0.0}
    own = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": update}
    (other / config).write_text(json.dumps(own))
