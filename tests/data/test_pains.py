"""What users of other tools keep running into, as far as it is about data.

Each test does on one input what is commonly done, shows that it goes wrong there, and that graft
does not.
"""

from __future__ import annotations

import json
import math
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from graft.api.config import TrainConfig
from graft.api.export import export_model
from graft.api.finetune import finetune
from graft.data.batches import IGNORED, PackedBatch, collate, pack
from graft.data.config import DataConfig
from graft.data.encode import EncodedData, encode_chat, encode_prompt
from graft.data.examples import Example
from graft.data.load import load_train_and_eval
from graft.data.overlap import overlap
from graft.data.sampler import BatchSampler
from graft.data.shapes.base import Rendered
from graft.data.storage.keys import keys_of
from graft.data.storage.store import Stored, packed, write_batches
from graft.errors import GraftError
from graft.model.load import load_model
from graft.model.running.attention import use_own_attention
from graft.objectives.registry import OBJECTIVES
from graft.train.gates import share_note
from graft.train.metrics import read_metrics

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def encoded(
    folder: Path, tokenizer: Any, rows: Sequence[dict[str, Any]], **options: Any
) -> EncodedData:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(data=str(file), eval_data=str(file), **options)
    return load_train_and_eval(config, tokenizer, None, 0)[0]


def trained_ids(example: Example) -> list[int]:
    return [token for token, on in zip(example.input_ids, example.targets, strict=True) if on]


# never stops talking: EOS masked with PAD --------------------------------------------------------


def test_a_model_learns_to_stop_where_padding_is_the_end_of_sequence(
    tmp_path: Path, build_tokenizer
) -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = [{"prompt": "a", "completion": "b" * length} for length in (3, 9)]
    examples = encoded(tmp_path, tokenizer, rows).examples
    batch = collate(examples)
    end = tokenizer.eos_token_id
    # What is commonly done: pad, then ignore every label that is the padding token.
    padded = tokenizer.pad({"input_ids": [one.input_ids for one in examples]}, return_tensors="pt")
    naive = padded["input_ids"].masked_fill(padded["input_ids"] == tokenizer.pad_token_id, IGNORED)
    assert not (naive == end).any(), "the end of sequence is never trained"
    assert [(row == end).sum().item() for row in batch.labels] == [1, 1]
    lengths = [len(one.input_ids) for one in examples]
    for row, length in zip(batch.labels, lengths, strict=True):
        assert row[length - 1] == end and (row[length:] == IGNORED).all()


# good in Python, gibberish elsewhere -------------------------------------------------------------


def test_a_prompt_is_dressed_everywhere_as_it_was_trained(tmp_path: Path, tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = CHATML
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_base.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(base)
    file = tmp_path / "chat.jsonl"
    file.write_text((json.dumps({"messages": CHAT}) + "\n") * 4)
    run = tmp_path / "run"
    settings = dict(model=str(base), data=str(file), out=str(run), method="lora", steps=1)
    finetune(TrainConfig(**settings, batch_size=2, checkpoints=False))
    export_model(run, "hf", tmp_path / "hf")
    elsewhere = AutoTokenizer.from_pretrained(tmp_path / "hf")
    (row,) = encoded(tmp_path, tokenizer, [{"messages": CHAT}]).examples
    prompt = row.input_ids[: row.targets.index(True)]
    # What is commonly done: the user's words alone, or a format of one's own.
    for naive in ("hi", "### user:\nhi\n\n### assistant:\n", "<|im_start|>user\nhi<|im_end|>\n"):
        assert elsewhere(naive)["input_ids"] != prompt
    golden = elsewhere.apply_chat_template(
        CHAT[:1], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert golden == prompt == encode_chat(CHAT[:1], tokenizer)


# wrong loss under gradient accumulation ----------------------------------------------------------


def test_accumulated_batches_of_unequal_rows_are_one_large_batch(
    tmp_path: Path, tiny_base: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "red", "completion": "lamp " * (1 if number % 4 else 9)} for number in range(17)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = {}
    for name, size, accumulated in (("large", 16, 1), ("small", 1, 16)):
        out = tmp_path / name
        finetune(
            TrainConfig(
                **dict(model=str(tiny_base), data=str(file), out=str(out), method="lora", steps=1),
                **dict(batch_size=size, grad_accum=accumulated, checkpoints=False),
            )
        )
        (step,) = [one for one in read_metrics(out / "metrics.jsonl") if "loss" in one]
        losses[name] = step["loss"]
    assert losses["small"] == pytest.approx(losses["large"], rel=1e-5)
    # What is commonly done: the mean of the batches' means, whatever each was the mean of.
    loaded = load_model(str(tiny_base), dtype="float32")
    config = DataConfig(data=str(file), eval_data=str(file))
    training, _ = load_train_and_eval(config, loaded.tokenizer, 64, 0)
    totals = [loss_of(loaded.model, collate([one])) for one in training.examples]
    targets = [sum(one.targets) for one in training.examples]
    single = [total / count for total, count in zip(totals, targets, strict=True)]
    right = sum(totals) / sum(targets)
    assert abs(sum(single) / len(single) - right) > 0.05
    assert losses["large"] == pytest.approx(right, rel=0.03)


def loss_of(model: Any, batch: Any) -> float:
    with torch.no_grad():
        total, _ = OBJECTIVES["next_token"].loss(model, batch)
    return float(total)


# masks all zero or all one -----------------------------------------------------------------------


def test_the_answer_is_trained_though_its_marker_has_other_tokens_in_the_text(
    tmp_path: Path, build_tokenizer
) -> None:
    tokenizer = build_tokenizer(merges=[("?", "#")])  # what stands before the marker joins it
    marker = "### Answer:"
    row = {"prompt": f"Question?{marker}", "completion": " yes"}
    (example,) = encoded(tmp_path, tokenizer, [row], separator="").examples
    # What is commonly done: look for the marker's own tokens, and train what follows them.
    wanted = tokenizer(marker, add_special_tokens=False)["input_ids"]
    ids = example.input_ids
    places = [at for at in range(len(ids)) if ids[at : at + len(wanted)] == wanted]
    assert places == [], "nothing is found, so the whole row is masked"
    assert tokenizer.decode(trained_ids(example)) == " yes</s>"


def test_rows_of_which_nothing_or_hardly_anything_is_trained_are_told(
    tmp_path: Path, tokenizer
) -> None:
    cut = {"prompt": "long " * 50, "completion": "answer"}
    # What is commonly done: cut, and go on with a row of nothing but masked tokens (loss NaN).
    ids = tokenizer(cut["prompt"] + cut["completion"])["input_ids"][:64]
    labels = torch.tensor([IGNORED] * len(ids))
    naive = torch.nn.functional.cross_entropy(torch.zeros(len(ids), 8), labels)
    assert math.isnan(float(naive))
    with pytest.raises(GraftError, match=r"rows.jsonl:1: no trained token is left"):
        encoded(tmp_path, tokenizer, [cut], max_length=64)
    hardly = {"prompt": "long " * 500, "completion": "a"}
    assert "only 0." in (share_note(encoded(tmp_path, tokenizer, [hardly], max_length=4000)) or "")


def test_the_answers_of_a_conversation_are_trained_and_nothing_else(
    tmp_path: Path, build_tokenizer
) -> None:
    tokenizer = build_tokenizer(chat_template=CHATML)
    chat = [*CHAT, {"role": "user", "content": "yes"}, {"role": "assistant", "content": "no"}]
    (example,) = encoded(tmp_path, tokenizer, [{"messages": chat}]).examples
    # What is commonly done: train all that follows the first answer, questions included.
    first = example.input_ids[example.targets.index(True) :]
    assert "user\nyes" in tokenizer.decode(first)
    assert tokenizer.decode(trained_ids(example)) == "yes<|im_end|>no<|im_end|></s>"


# prompts end in the middle of a token ------------------------------------------------------------


def test_generation_starts_from_the_very_tokens_that_training_had(
    tmp_path: Path, build_tokenizer
) -> None:
    tokenizer = build_tokenizer(merges=[("Ċ", "Ġ"), ("ĊĠ", "Ġ")])
    row = {"prompt": "def f(x):\n", "completion": "  return x"}
    (example,) = encoded(tmp_path, tokenizer, [row]).examples
    prompt = encode_prompt("prompt", row["prompt"], tokenizer, "\n")
    # What is commonly done: the whole text is tokenised at once.
    naive = tokenizer(row["prompt"] + row["completion"])["input_ids"]
    assert naive[: len(prompt)] != prompt
    assert example.input_ids[: len(prompt)] == prompt
    assert example.targets.index(True) == len(prompt)


# packing that leaks ------------------------------------------------------------------------------


def test_packed_rows_do_not_see_each_other(tiny_base: Path) -> None:
    model = load_model(str(tiny_base), dtype="float32").model
    use_own_attention(model)
    first, other, second = ([5, 6, 7, 8, 9], [15, 3, 2, 11, 4], [20, 21, 22, 23])

    def example(ids: list[int]) -> Example:
        return Example(ids, [False] + [True] * (len(ids) - 1), "x:1")

    def naive(ids: list[int]) -> Tensor:
        # What is commonly done: one row of tokens, one causal mask over all of it.
        with torch.no_grad():
            return model(torch.tensor([ids + second])).logits[0, len(ids) :]

    assert (naive(first) - naive(other)).abs().max() > 1e-3, "a row sees the one before it"
    batch = pack([example(first), example(second)])
    assert isinstance(batch, PackedBatch)
    together = loss_of(model, batch)
    alone = loss_of(model, collate([example(first)])) + loss_of(model, collate([example(second)]))
    assert together == pytest.approx(alone, rel=1e-6)
    changed = loss_of(model, pack([example(other), example(second)]))
    of_second = changed - loss_of(model, collate([example(other)]))
    assert of_second == pytest.approx(loss_of(model, collate([example(second)])), rel=1e-4)


# data larger than memory -------------------------------------------------------------------------


def test_stored_examples_take_a_few_bytes_each(tmp_path: Path) -> None:
    count, length = 1024, 500
    example = Example(list(range(length)), [True] * length, "rows.jsonl:1")
    file = tmp_path / "examples.arrow"
    write_batches(file, (packed([example] * 512, "rows.jsonl") for _ in range(count // 512)))
    # What is commonly done: a list of numbers for each row, kept for the whole training.
    naive = count * (sys.getsizeof(example.input_ids) + sys.getsizeof(example.targets))
    tracemalloc.start()
    with file.open("rb") as stream:
        stored = Stored(stream, "rows.jsonl")
    total = sum(sum(one.targets) for one in stored)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == count * length and len(stored) == count
    assert naive > 8_000_000 and peak < naive / 20


# resume is not the same run ----------------------------------------------------------------------


def test_a_resumed_training_sees_the_rows_that_it_has_not_seen() -> None:
    def sampler() -> BatchSampler:
        return BatchSampler(12, 3, seed=5)

    whole = sampler()
    seen = [next(whole) for _ in range(8)]
    part = sampler()
    for _ in range(2):
        next(part)
    # What is commonly done: the order begins anew, and rows are seen twice before others once.
    again = sampler()
    naive = seen[:2] + [next(again) for _ in range(2)]
    assert len({row for rows in naive for row in rows}) == 6
    going_on = sampler()
    going_on.restore(part.state())
    assert [next(going_on) for _ in range(6)] == seen[2:]
    assert sorted(row for rows in seen[:4] for row in rows) == list(range(12))


# trained on what it is tested on -----------------------------------------------------------------


def test_held_out_rows_that_are_trained_too_are_found(tmp_path: Path, tokenizer) -> None:
    training = [{"prompt": "Capital of Norway?", "completion": "Oslo."}]
    held_out = {"prompt": "capital of  Norway?\n", "completion": "oslo."}
    # What is commonly done: compare the texts, or nothing.
    assert held_out not in training
    train = encoded(tmp_path, tokenizer, training)
    test = encoded(tmp_path, tokenizer, [held_out])
    assert overlap(train.facts, test.facts).held_out_trained == 1
    assert keys_of(Rendered("A b")).row == keys_of(Rendered("a  B\n")).row
