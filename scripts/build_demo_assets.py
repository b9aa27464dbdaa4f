"""Build the demo's bundled data and base model from text that the demo's grammar writes.

    python scripts/build_demo_assets.py --work build/demo-assets

writes the pre-training text, trains the tokenizer, starts from a random model, trains it with
graft's own loop (every weight, method "full") and puts the result into src/graft/demo/assets.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import graft
from graft.demo.corpus import pretraining_rows
from graft.demo.grammar import task_rows

ASSETS = Path(__file__).resolve().parent.parent / "src" / "graft" / "demo" / "assets"
TRAIN_ROWS, HELD_OUT_ROWS = 3000, 200
VOCAB_SIZE, CONTEXT = 1536, 256
ROW_LENGTH = 128  # tokens of a pre-training row: as long as a row of the task gets
END, PAD = "<|endoftext|>", "<|pad|>"


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write rows as JSON lines, to a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    temporary.replace(path)


def write_task_data(folder: Path, seed: int) -> None:
    """Write train.jsonl and heldout.jsonl, which share no brand and no set of attributes."""
    write_rows(folder / "train.jsonl", task_rows(seed + 1, TRAIN_ROWS))
    write_rows(folder / "heldout.jsonl", task_rows(seed + 2, HELD_OUT_ROWS, held_out=True))


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with GPT-2's splitting rule and two special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def random_base(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return a Llama of 1.9 million random parameters whose rows fit blocks of 32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save model and tokenizer as a folder of bf16 safetensors and JSON, replacing the old one."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.bfloat16().save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def main() -> None:
    """Read the flags and build everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for corpus and run")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    write_task_data(ASSETS / "data", args.seed)
    corpus = args.work / "corpus.jsonl"
    write_rows(corpus, pretraining_rows(args.seed + 3, args.steps * args.batch_size))
    tokenizer = build_tokenizer(row["text"] for row in pretraining_rows(args.seed + 4, 5000))
    tokenizer.save_pretrained(args.work / "start")
    random_base(tokenizer, args.seed).save_pretrained(args.work / "start")
    graft.finetune(
        graft.TrainConfig(
            model=str(args.work / "start"),
            data=str(corpus),
            method="full",
            steps=args.steps,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            max_length=ROW_LENGTH,
            seed=args.seed,
            out=str(args.work / "run"),
        )
    )
    model, _ = graft.load(str(args.work / "run"))
    save_base(model, tokenizer, ASSETS / "base")


if __name__ == "__main__":
    main()
