from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.adapters.attach import attach_adapter
from graft.adapters.config import AdapterConfig
from graft.adapters.registry import METHODS, method_of
from graft.errors import GraftError
from graft.formats.registry import make_format
from graft.model.adapter_files import check_adapter, save_adapter
from graft.model.load import load_model
from graft.model.peft_files import PEFT_WEIGHTS
from graft.model.targets import freeze_layers, select_targets

ADAPTERS = [name for name in METHODS if METHODS[name].trains_adapter]


@pytest.mark.parametrize("grid_rank", [0, 2])
@pytest.mark.parametrize("method", ADAPTERS)
def test_a_saved_adapter_has_every_tensor_that_was_trained(
    method: str, grid_rank: int, tiny_base: Path, tmp_path: Path
) -> None:
    entry = METHODS[method]
    moves = grid_rank if "grid_rank" in entry.takes else 0
    config = AdapterConfig(method=method, rank=4, grid_rank=moves or None)
    needed = method_of(config).adapter.needed_format
    weight_format = None if needed is None else make_format(needed, {"group_size": 16})
    model = load_model(str(tiny_base), weight_format=weight_format, dtype="float32").model
    names = select_targets(model, ())
    if weight_format is None:
        freeze_layers(model, names)
    attach_adapter(model, names, config)
    folder = tmp_path / "adapter"
    save_adapter(model, folder)
    check_adapter(model, folder)

    file = folder / PEFT_WEIGHTS
    whole = load_file(file)
    first, *others = whole
    save_file({key: whole[key] for key in others}, file)
    with pytest.raises(GraftError, match="the file has None, what was trained"):
        check_adapter(model, folder)
    save_file({**whole, "stray.B": torch.zeros(2)}, file)
    with pytest.raises(GraftError, match="stray.*what was trained None"):
        check_adapter(model, folder)
    save_file({**whole, first: torch.zeros(3, 3)}, file)
    with pytest.raises(GraftError, match=r"the file has \[3, 3\]"):
        check_adapter(model, folder)
