from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from graft.errors import GraftError
from graft.model.tensor_file import FileTensor, write_tensor_file

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.uint32, torch.int64)


def plain(name, tensor):
    return FileTensor(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def test_a_file_reads_back_as_it_was_written(tmp_path):
    tensors = {
        f"{shape} {dtype}": (torch.randn(shape) * 9).abs().to(dtype)
        for dtype in DTYPES
        for shape in ((), (3,), (2, 5), (0, 4))
    }
    tensors["turned"] = torch.randn(4, 6).T
    calls = []
    path = tmp_path / "file.safetensors"
    write_tensor_file(
        path,
        [plain(name, tensor) for name, tensor in tensors.items()],
        lambda done, total: calls.append((done, total)),
    )
    found = load_file(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert calls == [(done, len(tensors)) for done in range(1, len(tensors) + 1)]
    assert [file.name for file in tmp_path.iterdir()] == ["file.safetensors"]


def test_a_failure_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"before")

    def fails():
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        write_tensor_file(path, [FileTensor("a", (2,), torch.float32, fails)])
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["file.safetensors"]
    with pytest.raises(GraftError, match="cannot be written"):
        write_tensor_file(path / "file", [plain("a", torch.ones(1))])  # a file is no folder
