"""Signals: a training stops with a checkpoint, all else ends cleanly, handlers are put back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from graft.cli.main import main
from graft.cli.progress import TerminalEvents

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def words(base: Path, rows: Path, out: Path, *more: str) -> list[str]:
    given = ["train", "--model", base, "--data", rows, "--out", out, "--steps", 4]
    return [*map(str, [*given, "--batch-size", 4, "--method", "lora"]), *more]


@pytest.fixture(autouse=True)
def _handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Send signals once, when the second step's metrics are shown."""

    def arrange(*numbers: int) -> None:
        sent: list[int] = []

        def metrics(self: TerminalEvents, metrics: dict[str, float]) -> None:
            if metrics["step"] == 2 and not sent:
                sent.extend(numbers)
                send(*numbers)

        monkeypatch.setattr(TerminalEvents, "metrics", metrics)

    return arrange


@pytest.mark.parametrize("number", SIGNALS)
def test_a_training_stops_with_a_checkpoint(number, at_step, tiny_base, rows, tmp_path, capfd):
    out = tmp_path / "a run"
    at_step(number)
    assert main(words(tiny_base, rows, out)) == 128 + number
    told = capfd.readouterr().err
    command = f"graft train --resume --out '{out}'"
    assert "stopped after step 2 of 4, with a checkpoint in" in told and command in told
    assert ("Ctrl-C again" in told) == (number == signal.SIGINT)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert (out / "report.json").is_file()


def test_a_second_interrupt_ends_at_once(at_step, tiny_base, rows, tmp_path, capfd):
    out = tmp_path / "run"
    at_step(signal.SIGINT, signal.SIGINT)
    assert main(words(tiny_base, rows, out)) == 130
    assert f"interrupted; go on with: graft train --resume --out {out}" in capfd.readouterr().err
    assert not (out / "checkpoints").exists()
    assert main(words(tiny_base, rows, out, "--resume")) == 0


def test_after_a_hangup_a_termination_changes_nothing(at_step, tiny_base, rows, tmp_path):
    at_step(signal.SIGHUP, signal.SIGTERM, signal.SIGTERM)
    assert main(words(tiny_base, rows, tmp_path / "run")) == 129
    assert (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.parametrize("when", ["run.base.save_base", "finetune.save_adapter"])
def test_before_and_after_the_training_it_ends_at_once(
    when, tiny_base, rows, tmp_path, monkeypatch, capfd
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(f"graft.api.{when}", lambda *arguments, **options: send(signal.SIGTERM))
        assert main(words(tiny_base, rows, out, "--method", "qalora")) == 143
    assert f"SIGTERM; go on with: graft train --resume --out {out}" in capfd.readouterr().err
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert (out / "adapter").is_dir() and not list(tmp_path.rglob(".*"))


def test_another_command_ends_as_on_an_interrupt(tiny_base, tmp_path, monkeypatch, capfd):
    progress = TerminalEvents.progress

    def terminated(self: TerminalEvents, stage: str, done: int, total: int) -> None:
        progress(self, stage, done, total)
        send(signal.SIGTERM)

    monkeypatch.setattr(TerminalEvents, "progress", terminated)
    out = tmp_path / "quantised"
    given = ["quantize", "--model", str(tiny_base), "--format", "int", "--out", str(out)]
    assert main(given) == 143
    assert "graft quantize: ended by SIGTERM" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_signal_that_is_ignored_stays_so(at_step, tiny_base, rows, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(signal.SIGHUP)
        assert main(words(tiny_base, rows, tmp_path / "run")) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_program_that_calls_finetune_keeps_its_handlers(tiny_base, rows, tmp_path):
    import graft
    from graft.api.events import Events

    before = [signal.getsignal(number) for number in SIGNALS]
    found: list[object] = []

    class Looks(Events):
        def metrics(self, metrics: dict[str, float]) -> None:
            found[:] = [signal.getsignal(number) for number in SIGNALS]

    config = graft.TrainConfig(
        model=str(tiny_base), data=str(rows), out=str(tmp_path / "run"), steps=1
    )
    graft.finetune(config, Looks())
    assert found == before
