"""Each bound of `graft verify` by itself: a runtime that is wrong in one way, on an honest file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import graft
import graft.api.verify
from graft.api.certificate import Certificate, in_words, problems_of
from graft.evaluate.fidelity import Fidelity
from graft.export.registry import TARGETS, target_of
from graft.export.runtimes import ItsTokenizer, Runtime


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

    @property
    def program(self) -> str:
        return "a runtime of this test"

    @property
    def tokenizers(self) -> tuple[ItsTokenizer, ...]:
        (real,) = self.real.tokenizers
        beside = ItsTokenizer("a program beside it", lambda text: [], bound=False)
        return (real._replace(encode=lambda text: self.ids(real.encode(text))), beside)

    @property
    def untried(self) -> tuple[str, ...]:
        return ("what this test leaves out",)

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
    "into other tokens": {"ids": lambda ids: ids[1:]},
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


def test_it_says_what_was_compared_with_what(exported, monkeypatch):
    found = verified(exported, monkeypatch)
    files, logits, greedy, tokens, beside, template, stop = found.compared
    run = str(exported[0])
    assert files.startswith(f"files: every byte of the {found.files} files with what an export of")
    assert run in files and files.endswith(": equal") and found.files == 5
    for words in (
        "in a runtime of this test, with those of",
        f"{run}, its adapter not merged, in graft, in float32, on 2 held-out rows of the run",
        f"the largest difference is {found.fidelity.logit_difference:.1e} of the largest logit",
        "(bound 2e-03)",
        "(bound 1e-03)",
        f"of {found.fidelity.positions} targets",
    ):
        assert words in logits
    assert f"{found.texts} of {found.texts} equal (no bound)" in greedy
    assert "by Transformers, from the folder with those by the model's own" in tokens
    assert tokens.endswith(": equal")
    assert "by a program beside it" in beside and beside.endswith("(no bound)")
    assert found.passed, "what has no bound is told alone"
    assert template.endswith("equal") and stop.endswith("equal")
    assert found.not_compared[0] == "what this test leaves out"
    assert "the model card" in found.not_compared[-1]
    assert "it is as exported" in found.not_compared[-1]
    assert json.loads(exported[1].with_name("hf.verify.json").read_text("utf-8"))["compared"]


def test_a_runtime_that_rounds_activations_is_bound_by_perplexity():
    fidelity = Fidelity(5e-4, 0.99, 0.02, 2.0, 2.011, 100)
    found = Certificate(
        **{"model": "m", "file": "f", "target": "gguf", "trained": "m", "rounds_activations": True},
        **{"bytes": 1, "bits_per_weight": 5.0, "files": 1, "differing_files": ()},
        **{"runtime": "r", "text": "t", "fidelity": fidelity, "equal_texts": 0, "texts": 0},
        **{"new_tokens": 1, "largest_gap": 0.0, "tokenizers": ()},
        **{"same_template": True, "same_stop_tokens": True},
    )
    assert problems_of(found) == ["perplexity changes by 0.55%; the bound is 0.5%"]
    assert "(bound: a change of 0.5%)" in in_words(found).compared[1]
    better = dataclasses.replace(fidelity, other_perplexity=2.009)
    assert problems_of(dataclasses.replace(found, fidelity=better)) == []


def test_a_file_that_is_no_export_is_refused(exported, tmp_path):
    run, folder = exported
    with pytest.raises(graft.GraftError, match="not a file that graft exports"):
        graft.verify(run, tmp_path)
    with pytest.raises(graft.GraftError, match="give --data"):
        graft.verify(folder, folder)
    assert target_of(folder).name == "hf"
