from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.errors import GraftError
from graft.evaluate import forgetting
from graft.evaluate.forgetting import (
    general_windows,
    measure_drift,
    observe,
    read_reference,
    write_reference,
)
from graft.model.load import LoadedModel, load_model
from graft.model.running import loss as running_loss
from graft.model.targets import freeze_layers, select_targets


@pytest.fixture
def loaded(tiny_base: Path) -> LoadedModel:
    """The tiny base with a LoRA that has dropout, in training mode."""
    found = load_model(str(tiny_base), dtype="float32")
    names = select_targets(found.model, ())
    freeze_layers(found.model, names)
    attach_adapter(found.model, names, AdapterConfig(method="lora", rank=4, dropout=0.5))
    found.model.train()
    return found


def move(loaded: LoadedModel) -> None:
    """Train, as it were."""
    with torch.no_grad():
        for parameter in adapter_parameters(loaded.model, "default").values():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def by_loop(loaded: LoadedModel, windows: Tensor) -> Tensor:
    """Return log-probabilities of every predicted token, float64 [tokens, vocabulary]."""
    found = []
    loaded.model.eval()
    for row in windows:
        ids = row[row >= 0]
        with torch.no_grad():
            logits = loaded.model(input_ids=ids[None]).logits[0, :-1]
        found.append(logits.double().log_softmax(-1))
    loaded.model.train()
    return torch.cat(found)


def test_the_divergence_is_the_one_that_a_loop_finds(loaded: LoadedModel) -> None:
    windows = general_windows(loaded.tokenizer, limit=64)
    before = by_loop(loaded, windows)
    reference = observe(loaded.model, windows)
    move(loaded)
    after = by_loop(loaded, windows)
    found = measure_drift(loaded.model, reference, tokens_at_once=200)
    expected = (before.exp() * (before - after)).sum(1).mean()
    assert found.kl == pytest.approx(expected.item(), rel=1e-3) and found.kl > 0.05
    tokens = torch.cat([row[row >= 0][1:] for row in windows])
    for figure, log_probs in ((found.perplexity_before, before), (found.perplexity, after)):
        loss = -log_probs.gather(1, tokens[:, None]).mean().item()
        assert figure == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.tokens == found.positions == len(tokens) > 1900


def test_nothing_has_drifted_before_training(loaded: LoadedModel) -> None:
    reference = observe(loaded.model, general_windows(loaded.tokenizer, limit=64))
    found = measure_drift(loaded.model, reference)
    assert 0 <= found.kl < 1e-6 and found.perplexity == found.perplexity_before


def test_a_large_vocabulary_is_sampled_evenly(loaded, monkeypatch) -> None:
    windows = general_windows(loaded.tokenizer, limit=64)
    before = by_loop(loaded, windows)
    monkeypatch.setattr(forgetting, "REFERENCE_BYTES", 2 * before.shape[1] * 100)
    reference = observe(loaded.model, windows, tokens_at_once=300)
    gaps = reference.positions.diff()
    assert len(reference.positions) == 100 and gaps.max() - gaps.min() <= 1
    torch.testing.assert_close(
        reference.log_probs.double(), before[reference.positions], rtol=1e-3, atol=1e-3
    )
    move(loaded)
    after = by_loop(loaded, windows)
    kept = before[reference.positions]
    expected = (kept.exp() * (kept - after[reference.positions])).sum(1).mean()
    found = measure_drift(loaded.model, reference)
    assert found.kl == pytest.approx(expected.item(), rel=1e-3) and found.positions == 100


def test_a_model_that_is_run_as_a_whole_gives_the_same(loaded, monkeypatch) -> None:
    windows = general_windows(loaded.tokenizer, limit=64)
    split = observe(loaded.model, windows)
    monkeypatch.setattr(running_loss, "splits", lambda model, input_ids: False)
    whole = observe(loaded.model, windows)
    assert whole.loss == pytest.approx(split.loss, rel=1e-6)
    torch.testing.assert_close(whole.log_probs, split.log_probs, rtol=1e-3, atol=1e-3)


def test_measuring_changes_neither_the_model_nor_random_states(loaded: LoadedModel) -> None:
    state = torch.get_rng_state()
    content = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    windows = general_windows(loaded.tokenizer, limit=64)
    measure_drift(loaded.model, observe(loaded.model, windows))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in loaded.model.modules())
    assert all(torch.equal(content[key], now) for key, now in loaded.model.state_dict().items())
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_measuring_takes_a_moment(loaded: LoadedModel) -> None:
    """About 0.03 s for the tiny model on an idle core: two forward passes of 2048 tokens."""
    windows = general_windows(loaded.tokenizer, limit=64)
    begin = time.process_time()
    measure_drift(loaded.model, observe(loaded.model, windows))
    assert time.process_time() - begin < 1.0


def test_a_reference_is_read_back_as_it_was_or_refused(loaded, tmp_path) -> None:
    reference = observe(loaded.model, general_windows(loaded.tokenizer, limit=64))
    path, vocabulary = tmp_path / "general.safetensors", reference.log_probs.shape[1]
    write_reference(path, reference)
    found = read_reference(path)
    assert found.loss == reference.loss
    for name in ("windows", "positions", "log_probs"):
        assert torch.equal(getattr(found, name), getattr(reference, name)), name
    other = forgetting.Reference(**{**vars(found), "log_probs": found.log_probs[:, 1:]})
    with pytest.raises(GraftError, match=f"knows {vocabulary} tokens, and .* {vocabulary - 1}"):
        measure_drift(loaded.model, other)
    for name, wrong in {
        "windows": reference.windows + vocabulary,
        "positions": reference.positions * 2,
        "log_probs": reference.log_probs[1:],
    }.items():
        write_reference(path, forgetting.Reference(**{**vars(reference), name: wrong}))
        with pytest.raises(GraftError, match="is damaged"):
            read_reference(path)


def test_the_users_own_text(loaded, tmp_path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("the red lamp is light and the blue chair is heavy " * 40, encoding="utf-8")
    windows = general_windows(loaded.tokenizer, text, limit=64)
    assert windows.shape[1] == 64 and (windows[0] >= 0).all()
    assert loaded.tokenizer.decode(windows[0]).removeprefix("<|end|>").startswith("the red lamp")
    text.write_text("", encoding="utf-8")
    with pytest.raises(GraftError, match="has no two tokens"):
        general_windows(loaded.tokenizer, text)
    with pytest.raises(GraftError, match="cannot be read"):
        general_windows(loaded.tokenizer, tmp_path / "none.txt")


def test_windows_with_tokens_that_the_model_does_not_know_are_left_out(loaded) -> None:
    whole = general_windows(loaded.tokenizer, limit=64)
    known = int(whole.max())
    found = general_windows(loaded.tokenizer, limit=64, vocabulary=known)
    assert 0 < len(found) < len(whole) and int(found.max()) < known
