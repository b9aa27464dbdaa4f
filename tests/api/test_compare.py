"""A comparison: what is trained once, what is resumed, what a failure leaves, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import graft.comparison.run as comparing
from graft.api.config import QuantizeConfig
from graft.api.evaluate import evaluate_model
from graft.api.finetune import finetune
from graft.api.merge import merge
from graft.api.quantize import quantize
from graft.api.run.folder import load_any
from graft.cli.main import main
from graft.comparison.config import CompareConfig
from graft.comparison.run import Comparison, compare
from graft.errors import GraftError
from graft.files.lock import LOCK, owned
from graft.train.stop import Stop, StoppedError


def configured(tiny_base: Path, rows: Path, out: Path, **changes: object) -> CompareConfig:
    settings: dict[str, object] = {
        "model": str(tiny_base),
        "data": str(rows),
        "out": str(out),
        "contenders": ("base", "base+rtn", "lora", "lora+rtn", "qalora"),
        "bits": (2,),
        "seeds": 2,
        "steps": 3,
        "batch_size": 4,
        "eval_fraction": 0.2,
        "generate": 2,
        "max_new_tokens": 4,
    }
    return CompareConfig(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that are trained, as they are."""
    names: list[str] = []

    def counting(config, events, stop):
        names.append(Path(config.out).name)
        return finetune(config, events, stop)

    monkeypatch.setattr(comparing, "finetune", counting)
    return names


@pytest.fixture(scope="module")
def compared(
    tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CompareConfig, Comparison]:
    config = configured(tiny_base, rows, tmp_path_factory.mktemp("compared"))
    return config, compare(config)


def test_what_a_comparison_measures(compared: tuple[CompareConfig, Comparison]) -> None:
    config, comparison = compared
    out = Path(config.out)
    assert not comparison.failed
    assert len(comparison.results) == 1 + 1 + 2 + 2 + 2
    assert len(list((out / "runs").iterdir())) == 2 + 2, "one lora run for each seed"
    assert not (out / "deployed").exists() or not any((out / "deployed").iterdir())
    by = {(r.contender, r.bits, r.seed): r for r in comparison.results}
    for seed in (0, 1):
        exact = by["qalora", 2, seed]  # in its weights; training has an attention of its own
        assert exact.perplexity == pytest.approx(exact.trained_perplexity, rel=1e-6)
        assert exact.bits_per_weight == 2 + 1, "two fp16 numbers for 32 weights"
        assert exact.run == f"qalora-2bit-seed{seed}"
    assert by["lora", None, 0].perplexity != by["lora", None, 1].perplexity
    assert by["lora+rtn", 2, 0].file_bytes < by["lora", None, 0].file_bytes  # type: ignore[operator]
    assert by["base", None, None].trained_parameters is None
    assert all(len(result.texts) == 2 for result in comparison.results)


def test_the_figures_are_those_of_the_commands_one_after_another(
    compared: tuple[CompareConfig, Comparison], tmp_path: Path
) -> None:
    config, comparison = compared
    out = Path(config.out)
    held_out = str(out / "data" / "heldout.jsonl")
    merge(out / "runs" / "lora-seed1", tmp_path / "dense")
    quantize(
        QuantizeConfig(
            model=str(tmp_path / "dense"), format="int", bits=2, out=str(tmp_path / "int2")
        )
    )
    loaded = load_any(tmp_path / "int2")
    scores = evaluate_model(loaded, held_out, batch_size=config.batch_size)
    (found,) = [
        result
        for result in comparison.results
        if (result.contender, result.bits, result.seed) == ("lora+rtn", 2, 1)
    ]
    assert found.loss == scores["loss"]
    assert found.file_bytes == (tmp_path / "int2" / "model.safetensors").stat().st_size


def test_the_split_is_written_once_and_holds_every_row(
    compared: tuple[CompareConfig, Comparison], rows: Path
) -> None:
    data = Path(compared[0].out) / "data"
    parts = [(data / f"{name}.jsonl").read_text().splitlines() for name in ("train", "heldout")]
    assert [len(part) for part in parts] == [32, 8]
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    there = [json.loads(line) for part in parts for line in part]
    assert sorted(map(str, there)) == sorted(map(str, given))


def test_the_files_hold_everything(compared: tuple[CompareConfig, Comparison]) -> None:
    comparison = compared[1]
    data = json.loads(comparison.data.read_text(encoding="utf-8"))
    assert len(data["entries"]) == len(comparison.results)
    entry = next(one for one in data["entries"] if one["contender"] == "qalora")
    wanted = {"loss", "perplexity", "exact_match", "bleu", "rouge_l", "file_bytes", "learning_rate"}
    wanted |= {"bits_per_weight", "trained_parameters", "training_seconds", "peak_memory_bytes"}
    assert all(isinstance(entry[name], int | float) for name in wanted)
    lora = next(one for one in data["summary"] if one["contender"] == "lora")
    assert lora["perplexity_ratio"]["mean"] == 1.0
    assert lora["perplexity"]["count"] == 2 and lora["perplexity"]["spread"] > 0
    page = comparison.page.read_text(encoding="utf-8")
    assert "http" not in page and "<script" not in page
    assert page.count("<svg class=") == 1 + 4 + 2, "a scatter chart, four trainings, two bar charts"
    assert "lora+rtn, 2 bits" in page


def test_a_second_call_does_nothing_again(
    compared: tuple[CompareConfig, Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, first = compared

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("this was done already")

    for name in ("finetune", "merge", "load_quantised", "load_model"):
        monkeypatch.setattr(comparing, name, never)
    assert compare(config).results == first.results


def test_more_may_be_compared_later_and_only_that_is_trained(
    tiny_base: Path, rows: Path, tmp_path: Path, trained: list[str]
) -> None:
    config = configured(tiny_base, rows, tmp_path / "out", contenders=("lora",), seeds=1)
    first = compare(config)
    assert trained == ["lora-seed0"]
    more = dataclasses.replace(config, contenders=("lora", "lora+gptq", "affine"), bits=(3,))
    second = compare(dataclasses.replace(more, keep=True))
    assert trained == ["lora-seed0", "affine-3bit-seed0"]
    assert second.results[0] == first.results[0]
    kept = {path.name for path in (tmp_path / "out" / "deployed").iterdir()}
    assert kept == {"lora-seed0", "lora+gptq-3bit-seed0", "affine-3bit-seed0"}


def test_other_methods_end_in_dense_weights_too(
    tiny_base: Path, rows: Path, tmp_path: Path, trained: list[str]
) -> None:
    words = ("qlora", "full", "full+rtn")
    config = configured(tiny_base, rows, tmp_path / "out", contenders=words, seeds=1, bits=(8,))
    comparison = compare(dataclasses.replace(config, generate=0, learning_rates=("full=3e-3",)))
    assert trained == ["qlora-seed0", "full-seed0"]
    qlora, full, rounded = comparison.results
    # The same weights; training rounds in its own kernels.
    assert full.perplexity == pytest.approx(full.trained_perplexity, rel=1e-5)
    assert full.learning_rate == 3e-3 and qlora.learning_rate != 3e-3
    as_trained = pytest.approx(qlora.trained_perplexity, rel=1e-4)
    assert qlora.perplexity != as_trained, "it is merged into the base as it was before NF4"
    assert rounded.perplexity == pytest.approx(full.perplexity, rel=1e-2)
    assert rounded.file_bytes < full.file_bytes  # type: ignore[operator]


def test_a_training_that_was_interrupted_goes_on_from_its_checkpoint(
    tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"contenders": ("lora",), "seeds": 1, "steps": 4, "save_every": 2, "generate": 0}
    whole = compare(configured(tiny_base, rows, tmp_path / "whole", **settings))
    config = configured(tiny_base, rows, tmp_path / "broken", **settings)

    class Interrupts(comparing.Events):
        def metrics(self, metrics):
            if metrics["step"] == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(config, Interrupts())
    resumed: list[bool] = []

    def noting(config, events, stop):
        resumed.append(config.resume)
        return finetune(config, events, stop)

    monkeypatch.setattr(comparing, "finetune", noting)
    assert compare(config).results[0].loss == whole.results[0].loss
    assert resumed == [True]


def test_a_comparison_has_one_owner_and_its_runs_have_too(
    tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = configured(tiny_base, rows, out, contenders=("lora",), seeds=1, steps=2, generate=0)
    out.mkdir()
    with owned(out), pytest.raises(GraftError, match="is in use by process"):
        compare(config)
    run = out / "runs" / "lora-seed0"
    run.mkdir(parents=True)
    with owned(run):
        (result,) = compare(config).results
        assert (run / LOCK).is_file(), "what another process trains is left alone"
    assert result.error is not None and "is in use by process" in result.error
    (result,) = compare(config).results
    assert result.error is None


def test_a_comparison_that_is_stopped_goes_on(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    settings = {"contenders": ("lora",), "seeds": 1, "steps": 4, "generate": 0}
    whole = compare(configured(tiny_base, rows, tmp_path / "whole", **settings))
    config, stop = configured(tiny_base, rows, tmp_path / "broken", **settings), Stop()

    class Stops(comparing.Events):
        def metrics(self, metrics):
            if metrics["step"] == 3:
                stop.ask()

    with pytest.raises(StoppedError, match="stopped after step 3 .* the same command goes on"):
        compare(config, Stops(), stop)
    assert compare(config).results[0].loss == whole.results[0].loss


def test_a_failure_does_not_lose_the_rest_and_is_tried_again(
    tiny_base: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(config, events, stop):
        if config.method == "qalora":
            raise RuntimeError("out of <memory>")
        return finetune(config, events, stop)

    monkeypatch.setattr(comparing, "finetune", failing)
    out = tmp_path / "out"
    words = ["--model", tiny_base, "--data", rows, "--out", out, "--steps", 2, "--batch-size", 4]
    words += ["--contenders", "qalora", "lora", "--generate", 0]
    command = ["compare", *map(str, words)]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "1 of 2 deployed models failed" in printed.err
    assert "qalora, 4 bits, seed 0: training failed: RuntimeError: out of <memory>" in printed.err
    assert "lora" in printed.out, "the table is shown all the same"
    failed, fine = json.loads((out / "compare.json").read_text())["entries"]
    assert "out of <memory>" in failed["error"] and failed["perplexity"] is None
    assert fine["error"] is None and fine["perplexity"] > 1
    page = (out / "compare.html").read_text()
    assert "out of &lt;memory&gt;" in page and "<memory>" not in page
    monkeypatch.setattr(comparing, "finetune", finetune)
    assert main(command) == 0
    entry, _ = json.loads((out / "compare.json").read_text())["entries"]
    assert entry["error"] is None and entry["perplexity"] > 1


def test_other_settings_or_data_are_refused(
    compared: tuple[CompareConfig, Comparison], tmp_path: Path
) -> None:
    config, _ = compared
    wrong = "rank is 8, was None.*group_size|group_size.*rank"
    with pytest.raises(GraftError, match=wrong) as told:
        compare(dataclasses.replace(config, rank=8, group_size=16))
    assert "group_size is 16, was 32" in str(told.value)
    (tmp_path / "rows.jsonl").write_text(Path(config.data).read_text() * 2)
    with pytest.raises(GraftError, match="the content of data"):
        compare(dataclasses.replace(config, data=str(tmp_path / "rows.jsonl")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(GraftError, match="is no comparison"):
        compare(dataclasses.replace(config, out=str(tmp_path / "full")))


def test_bad_input_is_told_all_at_once_before_anything_starts(
    tiny_base: Path, tmp_path: Path, trained: list[str]
) -> None:
    bad = tmp_path / "rows.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 1, "completion": "b"}\n')
    config = configured(
        tiny_base,
        bad,
        tmp_path / "out",
        contenders=("lora", "lorax"),
        seeds=0,
        learning_rates=("lora=fast",),
        targets=("query",),
    )
    with pytest.raises(GraftError) as told:
        compare(config)
    for piece in ("'lorax'", "--seeds is 0", "lora=fast", "'query'", "rows.jsonl:2"):
        assert piece in str(told.value)
    assert not trained and not (tmp_path / "out").exists()


def test_settings_that_one_contender_cannot_take_are_told_once_and_before(
    tiny_base: Path, rows: Path, tmp_path: Path, trained: list[str]
) -> None:
    bad = {"bits": (4, 5), "group_size": 48, "epochs": 1.0, "contenders": ("merge_aware@hqq",)}
    config = configured(tiny_base, rows, tmp_path / "out", **bad)
    with pytest.raises(GraftError) as told:
        compare(config)
    message = str(told.value)
    for piece in ("--steps and --epochs", "bits is 5", "int format; latent has none"):
        assert piece in message
    assert message.count("--steps and --epochs") == 1, "the same for every training: once"
    assert not trained and not (tmp_path / "out").exists()


def test_rows_without_prompts_are_not_continued(tiny_base: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "red lamp"}\n' * 12)
    config = configured(
        tiny_base, texts, tmp_path / "out", contenders=("base",), generate=None, seeds=1
    )
    assert compare(config).results[0].bleu is None
    with pytest.raises(GraftError, match="text rows have no prompt"):
        compare(dataclasses.replace(config, generate=3, out=str(tmp_path / "other")))


def test_the_last_answer_of_a_conversation_is_the_reference(
    tiny_base: Path, tmp_path: Path
) -> None:
    from graft.comparison.prepare import prepare

    turns = [("user", "red"), ("assistant", "lamp"), ("user", "blue"), ("assistant", "chair")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    chats = tmp_path / "chats.jsonl"
    chats.write_text((json.dumps(row) + "\n") * 8)
    config = configured(tiny_base, chats, tmp_path / "out", generate=1)
    (prompt,) = prepare(config).prompts
    assert (prompt.text, prompt.reference) == ("blue", "chair")
    text = load_any(tiny_base).tokenizer.decode(prompt.ids)
    assert "lamp" in text and "chair" not in text and text.endswith("### assistant:\n")


def test_scorers_are_needed_only_where_continuations_are_asked_for_by_name(
    tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import graft.evaluate.scores as scores

    monkeypatch.setattr(scores, "find_spec", lambda name: None)
    config = configured(tiny_base, rows, tmp_path / "out")
    with pytest.raises(GraftError, match="sacrebleu and rouge-score"):
        compare(config)
    assert not (tmp_path / "out").exists()
    config = dataclasses.replace(config, contenders=("base",), generate=None)
    (result,) = compare(config).results
    assert result.bleu is None and result.exact_match == 0.0
    monkeypatch.undo()
    with pytest.raises(GraftError, match="BLEU and ROUGE-L are scored is True, was False"):
        compare(config)


def test_the_demo_stands_for_the_bundled_model_and_data() -> None:
    from graft.cli.compare import demo_settings

    assert demo_settings({"out": ["x"]}, {}) == {}
    settings = demo_settings({"demo": ["true"]}, {})
    assert all(Path(settings[name]).exists() for name in ("model", "data", "eval_data"))
    assert "steps" in settings
    assert "steps" not in demo_settings({"demo": ["true"], "epochs": ["1"]}, {})
    assert demo_settings({"demo": ["false"]}, {"demo": True}) == {}


def test_a_document_is_one_row_of_a_comparison_however_long(
    tiny_base: Path, tmp_path: Path
) -> None:
    from graft.comparison.prepare import prepare

    texts = [f"the lamp is red and number {number} " * 20 for number in range(8)]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = configured(
        *(tiny_base, data, tmp_path / "out"),
        **{"generate": 0, "max_length": 32, "deduplicate": True},
    )
    found = prepare(config)
    assert len(found.training.examples) > 3 * len(texts), "there are several windows of each"
    files = [Path(found.config.data), Path(str(found.config.eval_data))]
    train, held_out = (
        [json.loads(line)["text"] for line in file.read_text().splitlines()] for file in files
    )
    assert sorted(train + held_out) == sorted(texts) and held_out
    assert not found.config.deduplicate, "which would take the weights of a mixture away"
    data.write_text(json.dumps({"text": " ".join(texts)}) + "\n")
    with pytest.raises(GraftError, match=r"texts.jsonl:1 is longer than all that is held out"):
        prepare(dataclasses.replace(config, out=str(tmp_path / "one")))
    assert not (tmp_path / "one").exists()
