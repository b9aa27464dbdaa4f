"""Training a quantised folder, which stays memory-mapped, with its layers read ahead or not."""

from __future__ import annotations

import sys

import pytest

import graft
from graft.api import finetune
from graft.model.running.prefetch import LayerPrefetch


@pytest.mark.skipif(sys.platform != "linux", reason="reads ahead on Linux only")
@pytest.mark.parametrize("checkpointing", ["none", "layers"])
def test_reading_ahead_changes_no_adapter(
    checkpointing, tiny_base, rows, tmp_path, monkeypatch
) -> None:
    quantised = tmp_path / "quantised"
    graft.quantize(graft.QuantizeConfig(model=str(tiny_base), format="nf4", out=str(quantised)))
    turns: list[tuple[int, int]] = []
    begin = LayerPrefetch.begin

    def counted(self: LayerPrefetch, layer: int, direction: int) -> None:
        begin(self, layer, direction)
        turns.append((layer, direction))

    monkeypatch.setattr(LayerPrefetch, "begin", counted)
    adapters = []
    for memory in (2**40, 0):
        monkeypatch.setattr(finetune, "free_bytes", lambda _, memory=memory: memory)
        assert not turns, "the model fits"
        run = tmp_path / f"run-{memory}"
        graft.finetune(
            graft.TrainConfig(
                model=str(quantised),
                data=str(rows),
                out=str(run),
                device="cpu",  # a GPU holds no mapped weights
                method="lora",
                checkpointing=checkpointing,
                steps=3,
                batch_size=4,
                max_length=48,
            )
        )
        adapters.append((run / "adapter" / "adapter_model.safetensors").read_bytes())
        assert not (run / "base").exists(), "the folder itself is the base"
    assert adapters[0] == adapters[1]
    assert turns.count((1, -1)) == 3
