"""Cards of real exports: figures from the run, equal on every machine, never over another file."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import yaml

import graft
from graft.api.run.folder import fingerprint_weights
from graft.api.run.report import RunReport
from graft.api.run.report import _markdown as report_markdown
from graft.cli.main import main
from graft.train.metrics import read_metrics
from graft.train.plots import plot_loss

BASE = ("name", "hub_id", "fingerprint", "license")


@pytest.fixture(scope="module")
def run(tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    shutil.copytree(tiny_base, folder / "base")
    card = "---\nlicense: apache-2.0\n---\n# The base\n"
    (folder / "base" / "README.md").write_text(card, encoding="utf-8")
    settings = {"method": "qalora", "steps": 2, "batch_size": 4, "seed": 7}
    graft.finetune(
        graft.TrainConfig(
            model=str(folder / "base"), data=str(rows), **settings, out=str(folder / "run")
        )
    )
    return folder / "run"


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_run_says_what_it_knows(run: Path, rows: Path, tmp_path: Path) -> None:
    graft.export_model(run, "gguf", tmp_path / "model.gguf")
    text = (tmp_path / "model.gguf.md").read_text(encoding="utf-8")
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert front(text) == {
        "license": "apache-2.0",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["graft", "qalora", "gguf"],
    }
    before, after = report["eval_loss_before"], report["eval_loss"]
    expected = {
        "name": "base",
        "fingerprint of its weights": report["base_fingerprint"],
        "file": "rows.jsonl",
        "SHA-256": hashlib.sha256(rows.read_bytes()).hexdigest(),
        "rows": "38",
        "tokens": f"{report['training_tokens']:,}",
        "held-out rows": "2, a share of the same file",
        "method": "qalora",
        "bits, group size": "4, 32",
        "steps, rows in each": "2, 4",
        "seed": "7",
        "loss before, after (nats per token)": f"{before:.4f}, {after:.4f}",
        "perplexity before, after": f"{math.exp(before):.4f}, {math.exp(after):.4f}",
        "weights": "14 layers: 4-bit integers in groups of 32",
        "merge": "14 layers: exact, every merged weight is the one that was trained",
    }
    for name, value in expected.items():
        assert f"| {name} | {value} |" in text, name
    assert f"torch {report['versions']['torch']}" in text
    assert "path" not in text and str(run.parent) not in text and "/tmp" not in text


def test_equal_exports_have_equal_cards(run: Path, tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        shutil.copytree(run, tmp_path / place / "run")
        graft.export_model(tmp_path / place / "run", "hf", tmp_path / place / "model")
    one, two = (tmp_path / place / "model" / "README.md" for place in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_merge_that_rounds_says_how_much(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    settings = {"method": "qlora", "steps": 2, "batch_size": 4, "out": str(tmp_path / "run")}
    graft.finetune(graft.TrainConfig(model=str(tiny_base), data=str(rows), **settings))
    graft.export_model(tmp_path / "run", "gguf", tmp_path / "m.gguf", requantize=True)
    text = (tmp_path / "m.gguf.md").read_text(encoding="utf-8")
    assert "in the worst one the error is" in text and "exact" not in text
    graft.export_model(tmp_path / "run", "peft", tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert front(text)["library_name"] == "peft" and "merge" not in text
    assert "| trained beside | 14 layers: nf4 |" in text


def test_the_report_of_an_older_run_is_enough(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "run"
    shutil.copytree(run, old)
    report = json.loads((old / "report.json").read_text(encoding="utf-8"))
    for name in ("training_tokens", "held_out_fingerprint", *(f"base_{n}" for n in BASE)):
        del report[name]
    (old / "report.json").write_text(json.dumps(report), encoding="utf-8")
    graft.export_model(old, "gguf", tmp_path / "old.gguf")
    text = (tmp_path / "old.gguf.md").read_text(encoding="utf-8")
    assert "| name | base |" in text and "| rows | 38 |" in text
    assert "tokens |" not in text and "fingerprint" not in text and "None" not in text
    (old / "report.json").unlink()
    graft.export_model(old, "gguf", tmp_path / "none.gguf")
    text = (tmp_path / "none.gguf.md").read_text(encoding="utf-8")
    assert "| method | qalora |" in text and "Scores" not in text and "None" not in text


def test_a_base_from_the_hub_is_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["base_hub_id"] is None, "it was a folder"
    report |= {"base_hub_id": "owner/name", "base_name": "name"}
    (tmp_path / "run" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    graft.export_model(tmp_path / "run", "gguf", tmp_path / "m.gguf")
    text = (tmp_path / "m.gguf.md").read_text(encoding="utf-8")
    assert front(text)["base_model"] == "owner/name"
    assert "# name, fine-tuned with qalora" in text and "| name | owner/name |" in text


@pytest.mark.parametrize("method", ["affine", "full"])
def test_a_method_without_a_rank_names_none(
    method: str, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    settings = {"method": method, "steps": 1, "batch_size": 4, "out": str(tmp_path / "run")}
    graft.finetune(graft.TrainConfig(model=str(tiny_base), data=str(rows), **settings))
    graft.export_model(tmp_path / "run", "gguf", tmp_path / "m.gguf")
    text = (tmp_path / "m.gguf.md").read_text(encoding="utf-8")
    assert f"| method | {method} |" in text and "rank" not in text
    assert ("| layers | all |" in text) == (method == "full")
    assert ("merge" in text) == (method == "affine")


def test_of_a_model_folder_nothing_is_made_up(tiny_base: Path, tmp_path: Path) -> None:
    graft.export_model(tiny_base, "hf", tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert front(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["graft"],
    }
    assert f"| fingerprint of its weights | {fingerprint_weights(tiny_base)} |" in text
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Model", "## How to run it"]


def test_the_licence_can_be_given(run: Path, tmp_path: Path) -> None:
    words = ["export", str(run), "--to", "gguf", "--out", str(tmp_path / "m.gguf")]
    assert main([*words, "--license", "mit"]) == 0
    assert front((tmp_path / "m.gguf.md").read_text(encoding="utf-8"))["license"] == "mit"


def test_a_file_in_the_card_s_place_stays(run: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf.md").write_text("mine", encoding="utf-8")
    with pytest.raises(graft.GraftError, match=r"m\.gguf\.md exists already"):
        graft.export_model(run, "gguf", tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf.md").read_text(encoding="utf-8") == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf.md"]


def test_people_may_edit_a_card(run: Path, tmp_path: Path) -> None:
    """It is told, and the model is verified all the same; another new file is not."""
    folder = tmp_path / "model"
    graft.export_model(run, "hf", folder)
    found = graft.verify(run, folder)
    assert found.passed and found.card == "as exported"
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "\nMore.\n", encoding="utf-8")
    found = graft.verify(run, folder)
    assert found.passed and found.card == "changed"
    card.rename(folder / "MODEL_CARD.md")
    found = graft.verify(run, folder)
    assert found.passed and found.card == "missing"
    (folder / "more.json").write_text("{}", encoding="utf-8")
    assert graft.verify(run, folder).differing_files == ("more.json",)


NASTY = "a|b <script>x</script> `c` $\\frac$ [d](http://e)\x1b[2J & \u202e"


def test_names_that_mark_up_are_shown_as_they_are(run: Path, tmp_path: Path) -> None:
    stored = json.loads((run / "report.json").read_text(encoding="utf-8"))
    stored |= {"model": f"/models/{NASTY}", "next_steps": [NASTY], "drift": None, "kept": NASTY}
    report = RunReport(**stored)
    text = report_markdown(report)
    assert not re.search(r"(?<!\\)(<script|\[d|`c|\$)", text) and "\x1b" not in text
    tables = [line for line in text.splitlines() if line.startswith("| kept")]
    assert len(re.findall(r"(?<!\\)\|", tables[0])) == 3
    plot_loss(read_metrics(run / "metrics.jsonl"), tmp_path / "loss.png", NASTY)
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("field", "value"),
    [("base_license", ["mit"]), ("training_rows", "38"), ("versions", 3), ("drift", {"kl": 1})],
)
def test_a_report_with_a_field_of_another_type_is_told(run, tmp_path, field, value) -> None:
    shutil.copytree(run, tmp_path / "run")
    stored = json.loads((run / "report.json").read_text(encoding="utf-8"))
    (tmp_path / "run" / "report.json").write_text(json.dumps(stored | {field: value}))
    with pytest.raises(graft.GraftError, match=rf"(?s)report.json is damaged.*{field}"):
        graft.export_model(tmp_path / "run", "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
