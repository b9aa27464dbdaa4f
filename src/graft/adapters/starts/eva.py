"""EVA: A begins as the directions in which a layer's inputs vary most, and ranks follow them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.config import AdapterConfig
from graft.adapters.starts.base import Inputs, Preparation
from graft.adapters.starts.low_rank import DrawnStart, low_rank_adapters
from graft.adapters.svd import leading_svd


class Eva(Preparation):
    """A = the first principal components of a layer's inputs (arXiv 2410.07170, section 3).

    With the covariance C of the inputs on rows of the training data, C = V diag(λ) Vᵀ, the rows of
    A are the first of V's columns, and each explains λ / trace(C) of the variance. Of all layers'
    components those that explain most are taken, `rank` times as many as there are layers, and at
    most rho `rank` in one layer; a layer of which none is taken gets no adapter.
    """

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config
        self._found: dict[str, tuple[Tensor, Tensor]] = {}
        """By layer: components, float32 [most, in_features], and what each explains."""

    def look(self, name: str, weight: Tensor, inputs: Inputs) -> None:
        mean = inputs.total / inputs.tokens
        covariance = inputs.second / inputs.tokens - torch.outer(mean, mean)
        most = round(self.config.update_rank * self.config.eva_rho)
        _, sizes, components = leading_svd(covariance, most, self.config.svd_steps)
        self._found[name] = components.float(), sizes / covariance.trace()

    def ranks(self) -> Mapping[str, int]:
        explained = [
            (share, name) for name, (_, shares) in self._found.items() for share in shares.tolist()
        ]
        explained.sort(key=lambda pair: -pair[0])
        taken = explained[: self.config.update_rank * len(self._found)]
        counts = Counter(name for _, name in taken)
        return {name: counts[name] for name in self._found}

    def components(self, name: str) -> Tensor:
        """Return a layer's components, float32 [most, in_features], the first explains most."""
        return self._found[name][0]

    def words(self) -> str:
        """Return the ranks in words."""
        ranks = self.ranks().values()
        without = sum(not rank for rank in ranks)
        end = f", and {without} layers without an adapter" if without else ""
        return f"ranks from {min(filter(None, ranks))} to {max(ranks)}{end}"


class _EvaStart(DrawnStart):
    name = "eva"
    reads_inputs = True
    chooses_ranks = True

    def problems(self, config: AdapterConfig, **facts: Any) -> list[str]:
        problems = super().problems(config, **facts)
        if config.eva_rho < 1:
            problems.append(f"--eva-rho is {config.eva_rho}; expected at least 1")
        return problems

    def prepare(self, config: AdapterConfig) -> Eva:
        return Eva(config)

    @torch.no_grad()
    def begin(
        self, model: nn.Module, preparation: Preparation | None, name: str = "default"
    ) -> str:
        assert isinstance(preparation, Eva)
        for layer_name, base, adapter, A, _ in low_rank_adapters(model, name):
            A.copy_(preparation.components(layer_name)[: len(A)])
            adapter.started(base)
        return f"eva: {preparation.words()}"


EVA = _EvaStart()
