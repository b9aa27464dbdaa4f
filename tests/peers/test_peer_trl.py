"""TRL on the same weights and tokens: losses, gradients and rewards of preference objectives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft.data.config import DataConfig
from graft.data.examples import Example, sequences_of
from graft.data.load import load_train_and_eval
from graft.model.load import load_model
from graft.model.running.attention import use_own_attention
from graft.objectives.config import ObjectiveConfig
from graft.objectives.reference import Referenced, find_out, unknown
from graft.objectives.registry import OBJECTIVES

trl = pytest.importorskip("trl", reason="TRL is not installed (make test-peers installs it)")

BETA = 0.3
QUIET = {
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
    "max_length": 40,
    "bf16": False,
    "gradient_checkpointing": False,
}


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    lines = [
        f'{{"prompt": "{n} of them:", "chosen": "yes, {n}", "rejected": "no{" at all" * (n % 3)}"}}'
        for n in range(8)
    ]
    path = tmp_path_factory.mktemp("pairs") / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def models(tiny_base):
    """The model that trains in graft and in TRL, and the one before training, which differs.

    New ones for each test: TRL changes how a model of its trainer computes.
    """
    ours = load_model(str(tiny_base), dtype="float32").model.requires_grad_(False)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in before.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    use_own_attention(ours)
    return ours, theirs, before


def rows_of(name, models, tiny_base, path):
    """Graft's rows with the reference that the model before training gives."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    config = ObjectiveConfig(beta=BETA, wanted_weight=1.5, unwanted_weight=0.5)
    objective = OBJECTIVES[name].configured(config)
    data = DataConfig(data=str(path), max_length=40)
    found, _ = load_train_and_eval(data, tokenizer, None, 0, holds=objective.holds)
    examples = objective.arranged(found, 40).examples
    known = unknown(examples)
    find_out(known, models[2], examples, range(len(examples)), 4)
    return objective, list(Referenced(examples, known)[:4])


def answer_of(side: Example) -> tuple[list[int], list[int]]:
    begin = side.targets.index(True)
    return side.input_ids[:begin], side.input_ids[begin:]


def compared(objective, examples, models, theirs, batch):
    """Both gradients of a layer's weight agree, and so do the losses."""
    ours = models[0]
    name = "model.layers.0.mlp.down_proj.weight"
    weight = ours.get_parameter(name).requires_grad_(True)
    for pack in (False, True):
        made = (objective.pack if pack else objective.collate)(examples)
        loss, measured = objective.loss(ours, made)
        (gradient,) = torch.autograd.grad(loss / made.targets, weight)
        expected = theirs.compute_loss(theirs.model, dict(batch))
        (wanted,) = torch.autograd.grad(expected, theirs.model.get_parameter(name))
        assert (loss / made.targets).item() == pytest.approx(expected.item(), abs=1e-5)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    weight.requires_grad_(False)
    return measured, made


def dataset(rows):
    return pytest.importorskip("datasets").Dataset.from_list(rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("loss", "smoothing", "count"), [("sigmoid", 0.0, 4), ("aot", 0.1, 1)])
def test_dpo_is_trls(loss, smoothing, count, models, tiny_base, preferences, tmp_path):
    """TRL smooths labels in aot, which of a single pair is the sigmoid loss."""
    objective, examples = rows_of("dpo", models, tiny_base, preferences)
    objective.smoothing, examples = smoothing, examples[:count]
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    trainer = trl.DPOTrainer(
        model=models[1],
        ref_model=models[2],
        args=trl.DPOConfig(
            str(tmp_path), beta=BETA, loss_type=[loss], label_smoothing=smoothing, **QUIET
        ),
        train_dataset=dataset(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )
    trainer.model.eval()
    told = []
    for example in examples:
        chosen, rejected = (answer_of(side) for side in sequences_of(example))
        assert chosen[0] == rejected[0]
        told.append({"prompt_ids": chosen[0], "chosen_ids": chosen[1], "rejected_ids": rejected[1]})
    measured, batch = compared(objective, examples, models, trainer, trainer.data_collator(told))
    metrics = trainer._metrics["eval"]
    for name, ours in (("margins", "margin"), ("chosen", "chosen"), ("rejected", "rejected")):
        theirs = metrics[f"rewards/{name}"][-1]
        assert measured[f"reward_{ours}"] / batch.targets == pytest.approx(theirs, abs=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_kto_is_trls(models, tiny_base, preferences, tmp_path):
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text(
        "".join(
            f'{{"prompt": "{n} of them:", "completion": "yes{" or no" * (n % 4)}",'
            f' "label": {"true" if n % 3 else "false"}}}\n'
            for n in range(8)
        ),
        encoding="utf-8",
    )
    objective, examples = rows_of("kto", models, tiny_base, labelled)
    rows = [{"prompt": "a", "completion": "b", "label": n % 2 == 0} for n in range(4)]
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    trainer = trl.KTOTrainer(
        model=models[1],
        ref_model=models[2],
        args=trl.KTOConfig(str(tmp_path), beta=BETA, **weights, **QUIET),
        train_dataset=dataset(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )
    trainer.model.eval()
    told = []
    for example in examples:
        own, other = (answer_of(side) for side in sequences_of(example))
        told.append(
            {
                "prompt_ids": own[0],
                "completion_ids": own[1],
                "KL_completion_ids": other[1],
                "label": example.values["wanted"][0],
            }
        )
    compared(objective, examples, models, trainer, trainer.data_collator(told))


def test_orpos_odds_ratio_is_trls(models, tiny_base, preferences):
    """The likelihood beside it is ours of the answer alone; TRL's is of the prompt's tokens too."""
    orpo = pytest.importorskip("trl.experimental.orpo", reason="this TRL has no ORPO")
    objective, examples = rows_of("orpo", models, tiny_base, preferences)
    means = []
    for example in examples:
        for side in sequences_of(example):
            ids = torch.tensor([side.input_ids])
            labels = torch.tensor([side.targets])
            logits = models[1](input_ids=ids).logits
            asked = ids.masked_fill(~labels, -100)
            means.append(orpo.ORPOTrainer.get_batch_logps(logits, asked, average_log_prob=True)[0])
    chosen, rejected = torch.stack(means[::2]), torch.stack(means[1::2])

    settings = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device=torch.device("cpu")))
    terms, *_ = orpo.ORPOTrainer.odds_ratio_loss(settings, chosen, rejected)
    loss, measured = objective.loss(models[0], objective.collate(examples))
    assert loss.item() == pytest.approx((-chosen - terms).sum().item(), abs=1e-4)
    assert measured["reward_margin"] == pytest.approx(
        (BETA * (chosen - rejected)).sum().item(), abs=1e-4
    )
