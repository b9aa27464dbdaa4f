"""Comparing: train what is needed once, deploy each contender, score what lies on the disk."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.api.events import Events
from graft.api.finetune import finetune
from graft.api.merge import merge
from graft.api.quantize import Rounding, load_quantised
from graft.api.run.layout import METRICS, MODEL, REPORT
from graft.api.run.report import stored_bits_per_weight, versions
from graft.api.run.resume import has_finished, owned_run
from graft.comparison.config import CompareConfig
from graft.comparison.contenders import Entry, Training
from graft.comparison.page import PageContent, write_page
from graft.comparison.prepare import SETTINGS, Prepared, int_format, prepare
from graft.comparison.results import Result, Row, RunCosts, read_result, row_as_dict, summarise
from graft.errors import GraftError
from graft.evaluate.generate import generate_texts
from graft.evaluate.loss import evaluate_loss
from graft.evaluate.scores import missing_scorers, score_texts, why_no_scorers
from graft.files.read import read_json, read_typed
from graft.files.write import remove_folder, write_json
from graft.formats.registry import parse_format
from graft.model.devices import resolve_device
from graft.model.load import LoadedModel, load_model
from graft.model.running.memory import forget_peak
from graft.model.save import save_model
from graft.train.metrics import read_metrics
from graft.train.stop import Stop, StoppedError

PAGE = "compare.html"
DATA = "compare.json"
_EVALUATIONS = 4
"""In a training whose settings do not say how many, beside the one at its beginning."""

_FAILURES = (GraftError, RuntimeError, MemoryError, OSError, ArithmeticError)
"""What one contender may die of, out of memory on a GPU among it, while the others go on."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison gave."""

    results: tuple[Result, ...]
    rows: tuple[Row, ...]
    """The results over the seeds."""
    page: Path
    data: Path
    """The page, and the JSON file with everything on it."""
    seconds: float
    """Of this call."""

    @property
    def failed(self) -> tuple[Result, ...]:
        """The contenders that have an error in place of figures."""
        return tuple(result for result in self.results if result.error is not None)


def compare(
    config: CompareConfig, events: Events | None = None, stop: Stop | None = None
) -> Comparison:
    """Train, deploy and score every contender, and write compare.json and compare.html.

    What an earlier call on the same folder finished is not done again. A contender that fails is
    recorded with its error, and the others go on; the next call tries it once more. Raises
    GraftError with everything that can be known to be wrong, before the first training starts, or
    when another process works in the folder; StoppedError when `stop` was asked in a training.
    """
    begin = time.perf_counter()
    prepared = prepare(config)
    with owned_run(prepared.out):
        try:
            return _Comparing(prepared, events or Events(), stop or Stop()).run(begin)
        except StoppedError as stopped:
            raise StoppedError(
                f"{prepared.out}: a training was {str(stopped).partition('. Go on with')[0]}; the "
                "same command goes on with the comparison",
                stopped.step,
            ) from stopped


class _Comparing:
    def __init__(self, prepared: Prepared, events: Events, stop: Stop) -> None:
        self.prepared, self.events, self.stop = prepared, events, stop
        self.out, self.config = prepared.out, prepared.config
        self.results: dict[Entry, Result] = {}

    def run(self, begin: float) -> Comparison:
        prepared = self.prepared
        for entry in prepared.entries:
            if (file := self._result_file(entry)).exists():
                try:
                    self.results[entry] = read_result(file, entry, len(prepared.prompts))
                except GraftError as damaged:
                    self.events.note(f"{damaged}; it is scored again")
        if self.results:
            scored = f"{len(self.results)} of {len(prepared.entries)}"
            self.events.note(f"{scored} deployed models are scored already")
        if prepared.prompts and missing_scorers():
            self.events.note(f"BLEU and ROUGE-L are left out: {why_no_scorers()}")
        rows = self._write()
        for training in (None, *prepared.trainings):
            pending = [
                entry
                for entry in prepared.entries
                if entry.training == training and entry not in self.results
            ]
            if pending:
                self._run_group(training, pending)
                rows = self._write()
        return Comparison(
            tuple(self._in_order()),
            tuple(rows),
            self.out / PAGE,
            self.out / DATA,
            time.perf_counter() - begin,
        )

    def _run_group(self, training: Training | None, pending: Sequence[Entry]) -> None:
        """Train once, then deploy and score the entries that deploy it."""
        error = None
        if training is not None:
            try:
                self._train(training)
            except _FAILURES as failure:
                error = f"training failed: {_reason(failure)}"
        for entry in pending:
            try:
                if error is not None:
                    raise GraftError(error)
                result = self._score(entry)
                write_json(self._result_file(entry), asdict(result))
                outcome = f"perplexity {result.perplexity:.4f} as deployed"
            except _FAILURES as failure:
                result = Result(
                    contender=entry.contender.name,
                    bits=entry.bits,
                    seed=entry.seed,
                    error=_reason(failure),
                )
                outcome = str(result.error)
            self.results[entry] = result
            done, total = len(self.results), len(self.prepared.entries)
            self.events.note(f"{done} of {total}: {entry.label}: {outcome}")
            self.events.progress("comparison", done, total)
            gc.collect()
        if not self.config.keep:  # the dense merge that all shared, and what failures left
            for part in (training, *pending):
                if part is not None:
                    remove_folder(self._deployed(part.name))

    def _train(self, training: Training) -> None:
        run = self._run(training)
        if has_finished(run):
            with owned_run(run):  # which clears away what a kill at its very end left
                return
        self.events.note(f"training {training.name}")
        config = training.config(self.config, str(run))
        eval_every = config.eval_every or max(1, self.prepared.steps // _EVALUATIONS)
        config = dataclasses.replace(config, eval_every=eval_every, resume=run.exists())
        gc.collect()
        forget_peak(resolve_device(config.device))
        finetune(config, self.events, self.stop)

    # Deploying and scoring ------------------------------------------------------------------------

    def _score(self, entry: Entry) -> Result:
        """Deploy an entry and score what is read back from its folder."""
        begin = time.perf_counter()
        folder = self._deploy(entry)
        seconds = time.perf_counter() - begin
        loaded = self._load(folder)
        loss = evaluate_loss(loaded.model, self.prepared.held_out.examples, self.config.batch_size)
        if not math.isfinite(loss.loss):
            raise GraftError(f"the deployed model's loss on the held-out rows is {loss.loss}")
        texts = self._continuations(loaded, entry)
        result = Result(
            contender=entry.contender.name,
            bits=entry.bits,
            seed=entry.seed,
            loss=loss.loss,
            perplexity=loss.perplexity,
            file_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            bits_per_weight=stored_bits_per_weight(loaded.model),
            deploying_seconds=None if folder == self.prepared.folder else seconds,
            texts=tuple(texts),
            **self._text_scores(texts),
            **self._costs(entry.training),
        )
        if entry.contender.solver is not None and not self.config.keep:
            remove_folder(folder)
        return result

    def _deploy(self, entry: Entry) -> Path:
        """Return the folder that the entry is deployed as, made if it is not there."""
        dense = entry.bits is None
        if entry.contender.trains_on_integers or dense:
            return self._merged(entry.training)
        folder = self._deployed(entry.name)
        if not folder.is_dir():
            assert entry.bits is not None and entry.contender.solver is not None
            rounding = Rounding(
                weight_format=parse_format(int_format(entry.bits, self.config)),
                solver=entry.contender.solver,
                targets=self.config.targets,
                calibration=self.prepared.training.examples[: self.config.calibration_rows],
                damping=self.config.damping,
            )
            loaded = load_quantised(
                str(self._merged(entry.training)),
                rounding,
                dtype=self.config.dtype,
                device=self.config.device,
                trust_remote_code=self.config.trust_remote_code,
                events=self.events,
            )
            save_model(loaded, folder)
        return folder

    def _merged(self, training: Training | None) -> Path:
        """Return the folder of a merged run, made if it is not there; the base's for no run."""
        if training is None:
            return self.prepared.folder
        run = self._run(training)
        if (run / MODEL).is_dir():  # it trained the weights themselves
            return run / MODEL
        folder = self._deployed(training.name)
        if not folder.is_dir():
            merge(
                run,
                folder,
                into=training.contender.merges_into,
                device=self.config.device,
                trust_remote_code=self.config.trust_remote_code,
                events=self.events,
            )
        return folder

    def _load(self, folder: Path) -> LoadedModel:
        return load_model(
            str(folder),
            dtype=self.config.dtype,
            device=self.config.device,
            trust_remote_code=self.config.trust_remote_code,
        )

    def _continuations(self, loaded: LoadedModel, entry: Entry) -> list[str]:
        prompts = [prompt.ids for prompt in self.prepared.prompts]
        return generate_texts(
            loaded.model,
            loaded.tokenizer,
            prompts,
            max_new_tokens=self.config.max_new_tokens,
            on_done=lambda done: self.events.progress(
                f"writing: {entry.label}", done, len(prompts)
            ),
        )

    def _text_scores(self, texts: Sequence[str]) -> dict[str, Any]:
        if not texts:
            return {}
        prompts = self.prepared.prompts
        scores = asdict(
            score_texts(
                [prompt.text for prompt in prompts], texts, [prompt.reference for prompt in prompts]
            )
        )
        del scores["texts"]
        return scores

    def _costs(self, training: Training | None) -> dict[str, Any]:
        """Return what the training cost, from its report."""
        if training is None:
            return {}
        costs = read_typed(self._run(training) / REPORT, RunCosts)
        return {
            "run": training.name,
            "trained_perplexity": costs.perplexity,
            "trained_parameters": costs.trainable_parameters,
            "training_seconds": costs.seconds,
            "peak_memory_bytes": costs.peak_memory_bytes,
            "learning_rate": costs.learning_rate,
        }

    # What is written ------------------------------------------------------------------------------

    def _in_order(self) -> list[Result]:
        found = (self.results.get(entry) for entry in self.prepared.entries)
        return [result for result in found if result is not None]

    def _write(self) -> list[Row]:
        """Write compare.json and compare.html of all there is so far; return the table's rows."""
        prepared, results = self.prepared, self._in_order()
        rows = summarise(results)
        settings = read_json(self.out / SETTINGS)
        about = {"versions": versions(), "training_rows": len(prepared.training.examples)}
        about |= {"held_out_rows": len(prepared.held_out.examples), "steps": prepared.steps}
        entries = [{**asdict(result), "texts": len(result.texts)} for result in results]
        summary = [row_as_dict(row) for row in rows]
        write_json(
            self.out / DATA,
            {"settings": settings, **about, "entries": entries, "summary": summary},
        )
        runs = {training.name: self._run(training) / METRICS for training in prepared.trainings}
        write_page(
            self.out / PAGE,
            PageContent(
                settings=settings,
                about=about,
                results=results,
                rows=rows,
                curves={name: read_metrics(file) for name, file in runs.items()},
                prompts=prepared.prompts,
            ),
        )
        return rows

    def _run(self, training: Training) -> Path:
        return self.out / "runs" / training.name

    def _deployed(self, name: str) -> Path:
        return self.out / "deployed" / name

    def _result_file(self, entry: Entry) -> Path:
        return self.out / "results" / f"{entry.name}.json"


def _reason(failure: BaseException) -> str:
    """Return what to record of a failure: a GraftError speaks for itself."""
    return (
        str(failure) if isinstance(failure, GraftError) else f"{type(failure).__name__}: {failure}"
    )
