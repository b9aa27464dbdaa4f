"""The inputs of a model's stages, each stage on the rounded ones before it, in linear time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.calibrate.hessian import HessianSum

Collectors = Sequence[tuple[nn.Module, HessianSum]]
"""Linear layers of a stage, each with the sum that its inputs are added to."""


class _StageDone(Exception):  # noqa: N818  (control flow, never seen outside)
    """Ends a forward pass once the stage's inputs are known."""


@dataclass(frozen=True)
class _Call:
    """How the model called a stage for one batch, without the hidden states."""

    rest: tuple[Any, ...]
    keywords: dict[str, Any]
    follows: str | None
    """The stage whose very output the hidden states were."""


class StageChain:
    """Runs a model stage by stage (decoder layer by decoder layer) over calibration batches.

    A first pass over the model notes how each stage is called (masks, positions), and whether the
    hidden states that it gets are the very object that the stage before returned. Where they are,
    a stage is called again by itself with what the stage before gives now that it is rounded. Any
    other stage (the first, the head, one behind a layer that is no stage) is reached by running the
    model from its start. So n decoder layers cost three forward passes and not n/2.

    With `drift` every stage is called a second time, with the hidden states that it had before any
    stage was rounded, so that the sums know how far its inputs have moved. Behind a stage that is
    reached from the start of the model this is counted anew.

    batches: input_ids int64 [rows, tokens]. One hidden state per token is kept, two with `drift`.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[str],
        batches: Sequence[Tensor],
        drift: bool = False,
    ) -> None:
        device = next(model.parameters()).device
        self._model = model
        self._batches = [batch.to(device) for batch in batches]
        self._calls: dict[str, list[_Call]] = {name: [] for name in stages}
        self._last: str | None = None
        self._inputs: list[Any] = []
        """What the last stage got as hidden states, by batch."""
        self._drift = drift
        self._unrounded: list[Any] = []
        """What the next stage would get if nothing were rounded, by batch."""
        self._note_calls()

    @torch.no_grad()
    def run(self, stage: str, collectors: Collectors) -> None:
        """Run a stage on every batch; each module's inputs are added to the sum beside it."""
        following = self._last is not None and self._follows(stage, self._last)
        inputs = self._outputs_of_last() if following else []
        unrounded: dict[nn.Module, Tensor] = {}

        def add(module: nn.Module, hessian: HessianSum, x: Tensor) -> None:
            hessian.add(x, unrounded.get(module))

        def keep(module: nn.Module, _: HessianSum, x: Tensor) -> None:
            unrounded[module] = x

        if following:
            for index, hidden in enumerate(inputs):
                unrounded.clear()
                if self._drift:
                    with _each_input(collectors, keep):
                        self._unrounded[index] = self._call(stage, index, self._unrounded[index])
                with _each_input(collectors, add):
                    self._call(stage, index, hidden)
        else:
            with _each_input(collectors, add):
                inputs, outputs = self._from_the_start(stage)
            self._unrounded = outputs if self._drift else []
        self._last, self._inputs = stage, inputs

    def _call(self, stage: str, index: int, hidden: Any) -> Any:
        """Return what a stage makes of hidden states when it is called as for that batch."""
        call = self._calls[stage][index]
        module = self._model.get_submodule(stage)
        return _hidden_states(module(hidden, *call.rest, **call.keywords))

    def _follows(self, stage: str, before: str) -> bool:
        calls = self._calls[stage]
        return len(calls) == len(self._batches) == len(self._inputs) and all(
            call.follows == before for call in calls
        )

    def _outputs_of_last(self) -> list[Tensor]:
        assert self._last is not None
        return [self._call(self._last, index, hidden) for index, hidden in enumerate(self._inputs)]

    def _from_the_start(self, stage: str) -> tuple[list[Any], list[Any]]:
        """Run the model up to the end of a stage; return what the stage got and gave, by batch."""
        inputs: list[Any] = []
        outputs: list[Any] = []

        def stop(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            inputs.extend(args[:1])
            outputs.append(_hidden_states(output))
            raise _StageDone

        handle = self._model.get_submodule(stage).register_forward_hook(stop)
        try:
            for batch in self._batches:
                try:
                    self._model(input_ids=batch, use_cache=False)
                except _StageDone:
                    continue
        finally:
            handle.remove()
        return inputs, outputs

    @torch.no_grad()
    def _note_calls(self) -> None:
        seen: tuple[str | None, Any] = None, None

        def note(name: str) -> Callable[..., None]:
            def before(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                follows = seen[0] if args and args[0] is seen[1] else None
                self._calls[name].append(_Call(args[1:], keywords, follows))

            return before

        def remember(name: str) -> Callable[..., None]:
            def after(_: nn.Module, __: object, output: Any) -> None:
                nonlocal seen
                seen = name, _hidden_states(output)

            return after

        with ExitStack() as hooks:
            for name in self._calls:
                stage = self._model.get_submodule(name)
                hooks.callback(stage.register_forward_pre_hook(note(name), with_kwargs=True).remove)
                hooks.callback(stage.register_forward_hook(remember(name)).remove)
            for batch in self._batches:
                self._model(input_ids=batch, use_cache=False)


@contextmanager
def _each_input(
    collectors: Collectors, collect: Callable[[nn.Module, HessianSum, Tensor], None]
) -> Iterator[None]:
    """Within, call `collect` with a module, its sum, and every input that the module gets."""
    with ExitStack() as hooks:
        for module, hessian in collectors:
            handle = module.register_forward_pre_hook(
                lambda module, args, hessian=hessian: collect(module, hessian, args[0])
            )
            hooks.callback(handle.remove)
        yield


def _hidden_states(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
