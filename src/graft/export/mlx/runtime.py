"""MLX by mlx-lm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graft.export.runtimes import FolderRuntime, loading


class MlxLm(FolderRuntime):
    """mlx-lm, which computes in the dtype of the file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import mlx_lm

        with loading(path, "mlx_lm", ValueError, RuntimeError, KeyError):
            self._model = mlx_lm.load(str(path))[0]

    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Runtime`."""
        import mlx.core as mx

        found = self._model(mx.array([list(ids)]))[0].astype(mx.float32)
        return torch.from_numpy(np.array(found))
