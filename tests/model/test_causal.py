"""Models that attend both ways, encoder-decoders and classifiers are refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from every_family import tiny_config
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from graft.api.config import PlanConfig, TrainConfig
from graft.api.convert import convert_model
from graft.api.evaluate import evaluate_model, generate
from graft.api.export import export_model
from graft.api.finetune import finetune
from graft.api.load import load
from graft.api.plan import plan
from graft.api.quantize import QuantizeConfig, quantize
from graft.errors import GraftError
from graft.model.causal import check_attention, check_config
from graft.model.load import load_model

Write = Callable[[PreTrainedModel], Path]


@pytest.fixture
def write(tiny_base: Path, tmp_path: Path) -> Write:
    """Write a model's folder with a tokenizer."""

    def written(model: PreTrainedModel) -> Path:
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_base / file, folder / file)
        return folder

    return written


def refusal(folder: Path) -> str:
    with pytest.raises(GraftError) as raised:
        load_model(str(folder), device="cpu")
    message = str(raised.value)
    assert message.count("\n") == 1 and len(message) < 600
    assert str(folder / "config.json") in message
    return message


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "xlm-roberta", "camembert"])
def test_a_masked_language_model_is_refused(family, write) -> None:
    model = AutoModelForMaskedLM.from_config(tiny_config(family))
    message = refusal(write(model))
    assert "attends both ways, as masked language models do" in message
    assert type(model).__name__ in message and '"is_decoder": true' in message


@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_an_encoder_decoder_is_refused(family, write) -> None:
    model = AutoModelForSeq2SeqLM.from_config(tiny_config(family))
    message = refusal(write(model))
    assert "describes an encoder-decoder" in message and type(model).__name__ in message


def test_so_is_its_decoder_alone(write) -> None:
    # Whose configuration says is_decoder, and no more is_encoder_decoder.
    model = AutoModelForCausalLM.from_config(tiny_config("bart"))
    assert not model.config.is_encoder_decoder
    assert "describes an encoder-decoder" in refusal(write(model))


def test_a_classifier_is_refused(write) -> None:
    config = tiny_config("llama")
    config.tie_word_embeddings = True  # no head is missing from its files
    message = refusal(write(AutoModelForSequenceClassification.from_config(config)))
    assert "a model that classifies texts" in message
    assert "LlamaForSequenceClassification" in message


def test_a_family_without_a_causal_class_is_refused_in_two_lines(write) -> None:
    model = AutoModelForMaskedLM.from_config(tiny_config("distilbert"))
    assert "no causal language model of Transformers" in refusal(write(model))


def test_a_bert_that_decodes_is_a_causal_model(write, logits) -> None:
    config = tiny_config("bert")
    config.is_decoder = True
    folder = write(AutoModelForCausalLM.from_config(config))
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(load_model(str(folder), device="cpu").model), logits(expected))


@pytest.mark.parametrize(
    ("family", "setting"), [("gemma3_text", "use_bidirectional_attention"), ("llama", "is_causal")]
)
def test_a_decoder_that_is_told_to_attend_both_ways_is_refused(family, setting) -> None:
    config = tiny_config(family)
    setattr(config, setting, setting != "is_causal")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(GraftError, match="attends both ways"):
        check_attention(model)


def test_every_command_refuses_it(write, rows, tmp_path) -> None:
    folder = write(AutoModelForMaskedLM.from_config(tiny_config("bert")))
    out = str(tmp_path / "out")
    model = str(folder)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(load_file(folder / "model.safetensors"), pickled / "pytorch_model.bin")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / file, pickled / file)
    for command in (
        lambda: finetune(TrainConfig(model=model, data=str(rows), steps=1, out=out)),
        lambda: plan(PlanConfig(model=model)),
        lambda: load(folder),
        lambda: evaluate_model(model, str(rows)),
        lambda: generate(model, "a word"),
        lambda: quantize(QuantizeConfig(model=model, out=out, format="int8")),
        lambda: convert_model(str(pickled), out),
        lambda: export_model(folder, "hf", Path(out)),
    ):
        with pytest.raises(GraftError, match="attends both ways"):
            command()
    assert not Path(out).exists()


def test_an_unknown_family_of_own_code_may_be_causal() -> None:
    config = tiny_config("distilbert")
    config.auto_map = {"AutoModelForCausalLM": "modeling.Own"}
    check_config(config)
