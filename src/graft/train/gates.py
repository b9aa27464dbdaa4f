"""Gates that a healthy run passes: its targets end, its gradients live, its outputs change."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from graft.data.encode import EncodedData
from graft.data.examples import Example
from graft.data.overlap import Overlap
from graft.errors import GraftError

GRADIENTS_BY = 10
"""The step by which everything that trains must have had a gradient that is not zero."""
_FEW_ENDS = 0.5
_FEW_TARGETS = 0.02
_MANY_REPEATED = 0.01
_PROBED_TOKENS = 32
_NAMED = 5


def eos_note(data: EncodedData, eos: bool) -> str | None:
    """Return what to say where few rows train the end of sequence, though it is asked for."""
    share = data.eos_rows / len(data.examples)
    if not eos or share >= _FEW_ENDS:
        return None
    return (
        f"the end of sequence is trained in {data.eos_rows:,} of {len(data.examples):,} rows "
        f"({share:.0%}), and {data.cut_rows:,} are cut before it, so the model may not learn to "
        "stop; raise --max-length, or shorten the rows"
    )


def share_note(data: EncodedData) -> str | None:
    """Return what to say where hardly any token is trained."""
    if data.trained_share >= _FEW_TARGETS:
        return None
    return (
        f"only {data.trained_share:.1%} of the tokens are trained, so most of the time goes into "
        "prompts; are the answers where they should be? graft data shows rows token by token"
    )


def overlap_note(found: Overlap | None, training_rows: int, held_out_rows: int) -> str | None:
    """Return what to say of rows that are there twice, where it changes what a run is worth."""
    said: list[str] = []
    if found is None:
        return None
    if found.held_out_trained:
        said.append(
            f"{found.held_out_trained:,} of {held_out_rows:,} held-out rows are trained too (but "
            "for white space and case), so that the held-out loss promises too much"
        )
    if found.repeated > _MANY_REPEATED * training_rows:
        said.append(f"{found.repeated:,} of {training_rows:,} training rows repeat an earlier one")
    return "; ".join(said) + "; --deduplicate trains none of them twice" if said else None


def data_notes(training: EncodedData, held_out: EncodedData, eos: bool) -> list[str]:
    """Return all that there is to say of data before they are trained on; nothing is wrong."""
    found = (
        eos_note(training, eos),
        share_note(training),
        overlap_note(training.overlap, training.row_count, held_out.row_count),
    )
    read = dict.fromkeys((*training.notes, *held_out.notes))
    return [*read, *(note for note in found if note is not None)]


class DeadGradients:
    """Looks for trained tensors that have had only zero gradients.

    In step 1 a low-rank A has gradient zero, since B is still zero; a few steps later nothing has.
    What has had another gradient once is not looked at again, so a look soon costs nothing.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._trained = {name: p for name, p in parameters.items() if p.requires_grad}
        self._unmoved = dict(self._trained)

    def look(self) -> None:
        """Look at the gradients of a step."""
        for name, parameter in list(self._unmoved.items()):
            if parameter.grad is not None and bool(parameter.grad.any()):
                del self._unmoved[name]

    def note(self, steps: int) -> str | None:
        """Return what to say after so many steps where something has not been moved at all."""
        if not self._unmoved:
            return None
        names = ", ".join(list(self._unmoved)[:_NAMED])
        more = f" and {len(self._unmoved) - _NAMED} others" if len(self._unmoved) > _NAMED else ""
        return (
            f"{len(self._unmoved)} of {len(self._trained)} trained tensors had only zero gradients "
            f"in {steps} steps, so nothing trains them: {names}{more}. Do the data reach these "
            "layers? If they should not train, name the others with --targets"
        )


class OutputProbe:
    """Tells whether training has changed what the model computes, bit for bit, for one row.

    It is one forward pass of a few tokens when it is made and each time it is asked; it keeps no
    logits, and changes neither the model nor random states.
    """

    def __init__(self, model: PreTrainedModel, example: Example) -> None:
        self._model = model
        self._ids = torch.tensor([example.input_ids[:_PROBED_TOKENS]])
        self._before = self._digest()

    def changed(self) -> bool:
        """Return whether any logit differs from those at the beginning."""
        return self._digest() != self._before

    def _digest(self) -> bytes:
        was_training = self._model.training
        self._model.eval()
        with torch.no_grad():
            ids = self._ids.to(next(self._model.parameters()).device)
            logits = self._model(input_ids=ids, use_cache=False).logits
        self._model.train(was_training)
        content = logits.contiguous().cpu().flatten().view(torch.uint8).numpy().data
        return hashlib.sha256(content).digest()


class Gates:
    """The gates of a training: its loop calls them, and `note` gets what is no error."""

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Mapping[str, nn.Parameter],
        example: Example,
        steps: int,
        warmup_fraction: float,
        note: Callable[[str], None],
    ) -> None:
        """Take note of the model as it is before training; example: any row."""
        self._probe = OutputProbe(model, example)
        self._dead = DeadGradients(parameters)
        self._looks = 0
        self._steps, self._note = steps, note
        self._probed = probed_step(steps, warmup_fraction)

    def gradients(self, step: int) -> None:
        """Look at the gradients of one of the first steps."""
        if step > GRADIENTS_BY:
            return
        self._dead.look()
        self._looks += 1
        if self._looks > 1 and step == min(GRADIENTS_BY, self._steps):
            self._tell(self._dead.note(self._looks))

    def outputs(self, step: int) -> None:
        """Ask, after a step, whether training does anything; raises GraftError where it does not.

        Of a run that is too short to tell it is only said.
        """
        if step == self._probed:
            if not self._probe.changed():
                raise_unchanged(step)
        elif step == self._steps < self._probed and not self._probe.changed():
            self._tell(
                f"after {step} steps the model computes, bit for bit, what it did before: they "
                "are too few or too small; give more --steps, or raise --learning-rate"
            )

    def _tell(self, text: str | None) -> None:
        if text is not None:
            self._note(text)


def probed_step(steps: int, warmup_fraction: float) -> int:
    """Return the step after which outputs must have changed: the tenth, or the first at full rate.

    It is beyond the last where a run is too short to tell.
    """
    return max(GRADIENTS_BY, math.ceil(steps * warmup_fraction) + 1)


def raise_unchanged(step: int) -> None:
    """Raise GraftError for outputs that are, bit for bit, those from before training."""
    raise GraftError(
        f"step {step}: the model computes, bit for bit, what it did before training, so its steps "
        "are lost in the rounding of its numbers or reach no output; raise --learning-rate, or "
        "compute with --dtype float32"
    )
