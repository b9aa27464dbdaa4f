"""MLX by mlx-lm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graft.export.runtimes import FolderRuntime, ItsTokenizer, loading


class MlxLm(FolderRuntime):
    """mlx-lm, which computes in the dtype of the file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import mlx_lm

        with loading(path, "mlx_lm", ValueError, RuntimeError, KeyError):
            self._model, self._words = mlx_lm.load(str(path))[:2]

    @property
    def program(self) -> str:
        """See `Runtime`."""
        import mlx_lm

        return f"mlx-lm {mlx_lm.__version__}, in the dtype of the file"

    @property
    def tokenizers(self) -> tuple[ItsTokenizer, ...]:
        """See `Runtime`."""
        return (ItsTokenizer("mlx-lm, from the folder", self._words.encode),)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Runtime`."""
        import mlx.core as mx

        found = self._model(mx.array([list(ids)]))[0].astype(mx.float32)
        return torch.from_numpy(np.array(found))
