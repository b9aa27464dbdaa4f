"""`graft quantize`."""

from __future__ import annotations

from graft.api.config import QuantizeConfig
from graft.cli.command import Command
from graft.cli.show import show


def quantize(config: QuantizeConfig) -> None:
    """Write a model folder with quantised weights."""
    from graft.api.quantize import quantize as run
    from graft.cli.progress import progress

    with progress() as events:
        out = run(config, events)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    show(f"{out}: {size / 2**20:,.1f} MiB of weights")


COMMAND = Command(arguments=QuantizeConfig, run=quantize, loads_models=True, takes_file=True)
