"""What Transformers and tokenizers are given to read, looked at before.

Both take a model folder as it is: their exceptions on odd values are of every kind, and a count in
config.json is a loop. So each call of them on a folder's files is made inside `understood`, and
what would make them wait or grow for ever is looked at before.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from graft.errors import GraftError
from graft.files.bounds import bound, raise_beyond
from graft.text import quoted

FILE_BYTES = 256 * 2**20
"""Bytes that any file of settings or words may have in a model folder."""
LAYERS = 10_000
"""Layers that a configuration may ask for; the deepest models have a few hundred."""
MODULES = 20_000
"""Modules that any model may have; those of large ones are fewer than 4,000."""
MODULES_PER_TENSOR = 8
"""Modules for each tensor in the folder's files, where that is more: most modules hold one."""


def check_files(folder: Path) -> None:
    """Raise GraftError when a file of a model folder is none, or is too large to be read whole.

    A pipe or a device under the name of one would be waited for, or read for ever.
    """
    most = bound(FILE_BYTES)
    for path in folder.iterdir():
        try:
            status = path.stat()
        except OSError:
            continue  # a link to nothing is as if there were no file
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise GraftError(f"{path} is no regular file, but a pipe or a device; remove it")
        if path.suffix in (".json", ".jinja", ".txt", ".model") and status.st_size > most:
            raise_beyond(path, f"{status.st_size:,} bytes", f"{most:,}")


def check_counts(config: object, file: Path) -> None:
    """Raise GraftError when a configuration asks for too many layers, or for fewer than none.

    A count of layers is a loop already where the configuration is read.
    """
    for key, value in _settings(config):
        if type(value) is int and value < 0 and key.startswith(("n_", "num_")):
            raise GraftError(f"{file}: {key} is {value}, and it is a count; download it again")
        counts = isinstance(value, (int, float)) and ("layer" in key or key == "depth")
        if counts and value > bound(LAYERS):
            raise_beyond(file, f"{key} is {value:,}", f"{bound(LAYERS):,}")


def check_rotary(config: Mapping[str, Any], file: Path) -> None:
    """Raise GraftError when a configuration names two bases of its rotary positions.

    Other programs read `rope_theta`, Transformers today `rope_parameters`.
    """
    inside = config.get("rope_parameters")
    base = config.get("rope_theta")
    other = inside.get("rope_theta") if isinstance(inside, dict) else None
    if base and other and base != other:
        raise GraftError(
            f"{file}: rope_theta is {quoted(base)}, and in rope_parameters {quoted(other)}; "
            "readers differ in which they take: make them the same"
        )


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, of the configurations inside too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key), inner
            yield from _settings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _settings(inner)


@contextmanager
def modules_within(tensors: int) -> Iterator[None]:
    """Raise GraftError when the block builds more modules than a folder with so many tensors has.

    Whatever a configuration calls its counts, what they make is modules.
    """
    most = max(bound(MODULES), MODULES_PER_TENSOR * tensors)
    built = 0

    def count(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal built
        built += 1
        if built > most:
            found = f"it makes more than {most:,} modules, and the files hold {tensors:,} tensors"
            raise_beyond("config.json", found, f"{most:,} modules")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let the modules that the block builds have real buffers, and parameters without data."""

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None  # which leaves it as it is
        return nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(emptied)
    try:
        yield
    finally:
        hook.remove()


_DRAWING = (
    *(nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_),
    *(Tensor.normal_, Tensor.uniform_),
)


class NothingDrawn(TorchFunctionMode):
    """Draw no random numbers for tensors on the meta device inside the block: there they are none.

    PyTorch would do it by Python code of its own, for each tensor of a model.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func in _DRAWING:
            tensor = args[0] if args else options["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **options)
