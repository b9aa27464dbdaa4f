"""Each bound of `graft verify` by itself: a runtime that is wrong in one way, on an honest file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import graft
import graft.api.verify as verifying
from graft.export.registry import TARGETS, target_of
from graft.export.runtimes import Runtime


@dataclasses.dataclass
class Altered:
    """A runtime beside the real one."""

    real: Runtime
    change: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits
    ids: Callable[[list[int]], list[int]] = lambda ids: ids
    template: str | None = None
    stop_ids: set[int] = dataclasses.field(default_factory=set)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        return self.change(self.real.logits(ids))

    def encode(self, text: str) -> list[int]:
        return self.ids(self.real.encode(text))

    @property
    def chat_template(self) -> str | None:
        return self.template or self.real.chat_template


@pytest.fixture(scope="module")
def exported(tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("verify")
    settings = {"method": "qalora", "steps": 3, "batch_size": 4, "out": str(folder / "run")}
    graft.finetune(graft.TrainConfig(model=str(tiny_base), data=str(rows), **settings))
    graft.export_model(folder / "run", "hf", folder / "hf")
    return folder / "run", folder / "hf"


def spoilt(logits: torch.Tensor) -> torch.Tensor:
    """No number where the last target is predicted."""
    return torch.cat([logits[:-2], torch.full_like(logits[-2:-1], torch.nan), logits[-1:]])


def one_off(logits: torch.Tensor) -> torch.Tensor:
    """The least likely last target, a little more likely."""
    moved = logits.clone()
    moved[-2, moved[-2].argmin()] += 0.01 * logits.abs().max()
    return moved


CHANGES = {
    "KL is": {"change": lambda logits: 1.5 * logits},
    "KL is nan": {"change": spoilt},
    "a logit differs": {"change": one_off},
    "cut into other tokens": {"ids": lambda ids: ids[1:]},
    "chat template": {"template": "another"},
    "ends an answer": {"stop_ids": {7}},
}


def before_the_answer(logits: torch.Tensor) -> torch.Tensor:
    """Nothing but noise on the prompt, which no run of prompts and completions is trained on."""
    return torch.cat([torch.randn_like(logits[:4]), logits[4:]])


def verified(exported, monkeypatch, **changes) -> graft.api.verify.Certificate:
    run, folder = exported
    real = TARGETS["hf"].start(folder, 128)
    altered = Altered(real, **{"stop_ids": real.stop_ids, **changes})
    monkeypatch.setattr(TARGETS["hf"], "start", lambda *_: altered)
    return graft.verify(run, folder)


def test_the_real_runtime_passes(exported, monkeypatch):
    found = verified(exported, monkeypatch)
    assert found.passed and found.problems == ()
    assert found.fidelity.mean_kl <= 1e-9 and found.equal_texts == found.texts > 0


def test_only_targets_count(exported, monkeypatch):
    assert verified(exported, monkeypatch, change=before_the_answer).passed


@pytest.mark.parametrize("problem", list(CHANGES))
def test_what_is_wrong_is_named(problem, exported, monkeypatch):
    found = verified(exported, monkeypatch, **CHANGES[problem])
    assert not found.passed and found.differing_files == ()
    assert any(problem in one for one in found.problems), found.problems
    if "KL" not in problem:
        assert len(found.problems) == 1, "only what is wrong"


def test_a_runtime_that_rounds_activations_is_bound_by_perplexity():
    fidelity = verifying.Fidelity(5e-4, 0.99, 0.02, 2.0, 2.011, 100)
    found = verifying.Certificate(
        **{"model": "m", "file": "f", "target": "gguf", "rounds_activations": True},
        **{"bytes": 1, "bits_per_weight": 5.0, "differing_files": (), "fidelity": fidelity},
        **{"equal_texts": 0, "texts": 0, "largest_gap": 0.0, "problems": ()},
        **{"same_tokens": True, "same_template": True, "same_stop_tokens": True},
    )
    assert verifying._problems(found) == ["perplexity changes by 0.55%; the bound is 0.5%"]
    better = dataclasses.replace(fidelity, other_perplexity=2.009)
    assert verifying._problems(dataclasses.replace(found, fidelity=better)) == []


def test_a_file_that_is_no_export_is_refused(exported, tmp_path):
    run, folder = exported
    with pytest.raises(graft.GraftError, match="not a file that graft exports"):
        graft.verify(run, tmp_path)
    with pytest.raises(graft.GraftError, match="give --data"):
        graft.verify(folder, folder)
    assert target_of(folder).name == "hf"
