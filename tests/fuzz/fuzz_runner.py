"""Runs the real command on a mutated file, in a child of a warm process, and judges what it did."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import hashlib
import importlib
import json
import os
import pkgutil
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import fuzz_corpus
import torch
from fuzz_mutation import Expect, Mutation
from fuzz_targets import TARGETS, Command, Place, Target, evaluate_on, resume

import graft
from graft.cli.main import main

SECONDS = 10.0
"""What a command may take on these tiny models."""
BYTES = 2 * 2**30
"""What it may take of memory beyond the warm process."""
LONGEST_MESSAGE = 2000
_SOURCE = str(Path(graft.__file__).parent)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CHANGING = re.compile(r"second|memory|path|date|model|fingerprint|reason|^bytes$|^notes$")


@dataclass(frozen=True)
class Case:
    """One round; its name is its seed."""

    target: str
    number: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.target}/{self.seed}.{self.number}"

    @staticmethod
    def named(name: str) -> Case:
        """Return the case of a name that a report gives."""
        target, _, seeds = name.rpartition("/")
        seed, _, number = seeds.partition(".")
        return Case(target, int(number), int(seed))


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    case: Case
    status: str
    """ok, refused (a GraftError), usage, or the kind of failure."""
    where: str
    """Of a failure: the innermost place in graft."""
    what: str
    """What was done to which file, and the command."""
    detail: str
    """The message or the traceback."""
    seconds: float
    bytes: int
    """The peak beyond the warm process."""

    @property
    def failed(self) -> bool:
        return self.status not in ("ok", "refused", "usage")


def warm() -> None:
    """Import all that a command may import, and nothing that starts a thread."""
    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(graft.__path__, "graft."):
        if "triton" not in module.name and not module.name.endswith("runtime"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    import graft.api.run.report as report

    report.plot_loss = lambda *_: None  # it takes longer than the training
    logging = importlib.import_module("transformers.utils.logging")
    logging.set_verbosity_error()


class Fuzzer:
    """A corpus in a folder of its own, and rounds on copies of it.

    Everything that trains runs in children: after a first backward pass a process must not fork.
    """

    def __init__(self, folder: Path, small: bool = False) -> None:
        self.corpus, self.scratch, self.small = folder / "corpus", folder / "scratch", small
        self._sound: dict[tuple[str, Command, str], str] = {}
        warm()
        if not self.corpus.is_dir():
            self._build(folder)
        self._load_once()
        gc.collect()
        gc.freeze()

    def __enter__(self) -> Fuzzer:
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()  # else libraries tell of leaks at the end

    def _build(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with (folder / "corpus.log").open("w") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                    fuzz_corpus.build_corpus(self.corpus, self.small)
                status = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"no corpus: {(folder / 'corpus.log').read_text()[-3000:]}")

    def _load_once(self) -> None:
        """Load the model as a command does, for what is imported only then; no gradient flows."""
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            main(["generate", str(self.corpus / "base"), "--prompt", "a", "--max-new-tokens", "2"])

    def run(self, case: Case) -> Outcome:
        """Run one case and judge it; what seems to hang is tried a second time."""
        outcome = self._judged(case, TARGETS[case.target])
        if outcome.status == "hang":
            return self._judged(case, TARGETS[case.target])
        return outcome

    def control(self) -> None:
        """Raise RuntimeError unless an answer that differs from the sound one is found out."""

        def other_words(data: bytes, rng: Random) -> Mutation:
            return Mutation(data.replace(b"lamp", b"chair"), "other words", Expect.SAME)

        target = replace(TARGETS["data-jsonl"], mutate=other_words, commands=(evaluate_on,))
        if (found := self._judged(Case("control", 0), target)).status != "another answer":
            raise RuntimeError(f"another answer is not found out: {found}")

    def _judged(self, case: Case, target: Target) -> Outcome:
        rng = Random(case.name)
        index = rng.randrange(len(target.commands))
        command = target.commands[index]
        copy = self._copy(target.folder)
        file = rng.choice(sorted(copy.glob(target.file)))
        mutation = target.mutate(file.read_bytes(), rng)
        if not target.compared and mutation.expect is not Expect.REFUSED:
            mutation = replace(mutation, expect=Expect.ANY)
        if command is resume and mutation.expect is Expect.REFUSED:
            # It may also go on from an older checkpoint, or begin anew, to the same end.
            mutation = replace(mutation, expect=Expect.SAME_IF_READ)
        sound = None
        if mutation.expect in (Expect.SAME, Expect.SAME_IF_READ):
            sound = self._sound_answer(target, index, file.relative_to(copy))
            copy = self._copy(target.folder)
        _put(file, mutation, self.corpus)
        place = Place(self.corpus, copy, file, self.scratch / "out")
        found = self._in_child(command(place), place)
        what = f"{file.relative_to(copy)}: {mutation.what} | {' '.join(command(place))}"
        return _judge(case, found, mutation.expect, sound, what)

    def _copy(self, folder: str) -> Path:
        shutil.rmtree(self.scratch, ignore_errors=True)
        copy = self.scratch / Path(folder).name
        shutil.copytree(self.corpus / folder, copy)
        return copy

    def _sound_answer(self, target: Target, index: int, file: Path) -> str:
        """Return what the command gives on the file as it was."""
        key = (target.folder, target.commands[index], str(file))
        if key not in self._sound:
            copy = self._copy(target.folder)
            place = Place(self.corpus, copy, copy / file, self.scratch / "out")
            words = target.commands[index](place)
            found = self._in_child(words, place)
            if found.get("code") != 0:
                raise RuntimeError(f"{words} fails on sound files: {found}")
            self._sound[key] = found["answer"]
        return self._sound[key]

    def _in_child(self, words: tuple[str, ...], place: Place) -> dict[str, Any]:
        """Run graft in a child; return what it told of its end, and how it died if it did not."""
        log, told, said = (self.scratch / name for name in ("log", "told", "said"))
        begin, held = time.perf_counter(), _resident()
        child = os.fork()
        if child == 0:
            try:
                _drive(words, place, log, told, said)
            finally:
                os._exit(70)
        _, status, usage = _wait(child, 2 * SECONDS)
        found = {"seconds": time.perf_counter() - begin, "log": _text(log), "status": status}
        found["bytes"] = max(0, usage.ru_maxrss * 1024 - held)
        if told.is_file():
            found |= json.loads(told.read_text())
        return found


def _wait(child: int, seconds: float) -> tuple[int, int, Any]:
    """Wait for the child; one that ignores its own alarm is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended = os.wait4(child, os.WNOHANG)
        if ended[0]:
            return ended
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.wait4(child, 0)


def _drive(words: tuple[str, ...], place: Place, log: Path, told: Path, said: Path) -> None:
    """Be the child: run the command under its limits and write down how it ended."""
    for path, number in ((said, 1), (log, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY) if words[0] != "chat" else _question(said), 0)
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(place.copy.parent)
    faulthandler.enable(2)
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * BYTES, size + 2 * BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.manual_seed(0)
    end: dict[str, Any] = {}
    try:
        end["code"] = main(words)
    except SystemExit as error:
        end["code"] = error.code
    except BaseException as error:
        end["raised"] = type(error).__name__
        end["where"] = _innermost([frame.filename for frame in _frames(error)], _frames(error))
        end["trace"] = "".join(traceback.format_exception(error))[-6000:]
    faulthandler.cancel_dump_traceback_later()
    sys.stdout.flush()
    sys.stderr.flush()
    end["answer"] = _answer(place, said) if end.get("code") == 0 else ""
    told.write_text(json.dumps(end))
    os._exit(0)


def _question(said: Path) -> int:
    file = said.with_name("question")
    file.write_text("red lamp\n\n")
    return os.open(file, os.O_RDONLY)


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def _innermost(files: list[str], frames: list[traceback.FrameSummary]) -> str:
    for file, frame in zip(reversed(files), reversed(frames), strict=True):
        if file.startswith(_SOURCE):
            return f"{os.path.relpath(file, _SOURCE)}:{frame.name}"
    return "?"


def _answer(place: Place, said: Path) -> str:
    """Return the numbers that a command printed, and digests of the weights that it wrote."""
    text, answer = _text(said), {}
    if text.startswith("{"):
        told = json.loads(text)
        answer = {key: told[key] for key in told if not _CHANGING.search(key)}
    for path in sorted(place.copy.parent.rglob("*")):
        weights = path.suffix in (".safetensors", ".gguf") and "checkpoints" not in path.parts
        if weights and path.is_file() and path != place.file:
            answer[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return json.dumps(answer)


def _put(file: Path, mutation: Mutation, corpus: Path) -> None:
    file.unlink()
    if mutation.data is not None:
        file.write_bytes(mutation.data)
    elif mutation.instead == "folder":
        file.mkdir()
    elif mutation.instead == "fifo":
        os.mkfifo(file)
    elif mutation.instead == "zero":
        file.symlink_to("/dev/zero")
    elif mutation.instead != "missing":
        shutil.copyfile(corpus / mutation.instead, file)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace") if path.is_file() else ""


def _judge(
    case: Case, found: dict[str, Any], expect: Expect, sound: str | None, what: str
) -> Outcome:
    log = found["log"]
    status, where, detail = "ok", "", log[-3000:]
    if "raised" in found:
        status, where, detail = found["raised"], found["where"], found["trace"]
    elif "code" not in found:
        status, where = _death(found, log)
        detail = log[-6000:]
    elif found["code"] == 1:
        status, detail = "refused", log[log.find(": error: ") + 9 :]
        if len(detail) > LONGEST_MESSAGE:
            status, where = "long message", _first_words(detail)
        elif _CONTROL.search(detail):
            status, where = "raw control character", _first_words(detail)
        elif expect is Expect.SAME:
            status, where = "refused what is sound", _first_words(detail)
    elif found["code"] == 2:
        status = "usage"
    elif found["code"] != 0:
        status = f"exit status {found['code']}"
    elif sound is not None and found["answer"] != sound:
        status, detail = "another answer", f"{found['answer']}\nbut on the sound file\n{sound}"
    elif expect is Expect.REFUSED:
        status = "accepted"
    if found["bytes"] > BYTES and status in ("ok", "refused", "usage"):
        status = "memory"
    return Outcome(case, status, where, what, detail, found["seconds"], found["bytes"])


def _death(found: dict[str, Any], log: str) -> tuple[str, str]:
    places = re.findall(rf'File "{re.escape(_SOURCE)}/(\S+)", line \d+ in (\S+)', log)
    where = ":".join(places[0]) if places else "?"
    if "Timeout (" in log:
        return "hang", where
    if os.WIFSIGNALED(found["status"]):
        return f"died of {signal.Signals(os.WTERMSIG(found['status'])).name}", where
    return f"left with {os.WEXITSTATUS(found['status'])}", where


def _first_words(text: str) -> str:
    """Return what tells messages of one kind from others: their letters, without quotes."""
    return re.sub(r"[^a-z ]+", "", re.sub(r"/\S+|'[^']*'", "", text[:400].lower()))[:60].strip()
