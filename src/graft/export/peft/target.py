"""The target peft: the adapter by itself, in PEFT's format; qalora's as an ordinary LoRA."""

from __future__ import annotations

import json
from pathlib import Path

from graft.adapters.attach import adapter_names
from graft.adapters.config import AdapterConfig
from graft.adapters.registry import method_of
from graft.adapters.starts.registry import STARTS
from graft.errors import GraftError
from graft.export.base import FACTORED_BASE, OnTensor, Origin, Target, Usage
from graft.layers.factored import factored_layers
from graft.model.adapter_files import save_adapter
from graft.model.load import LoadedModel


class PeftTarget(Target):
    """See the module."""

    name = "peft"
    takes_adapter = True
    notes_on_card = False  # they name a folder of this machine

    def adapter_problems(self, config: AdapterConfig) -> list[str]:
        problem = method_of(config).peft_problem(config)
        return [] if problem is None else [problem]

    def write(
        self, loaded: LoadedModel, path: Path, origin: Origin, on_tensor: OnTensor
    ) -> tuple[str, ...]:
        names = adapter_names(loaded.model)
        if not names:
            raise GraftError(
                "--to peft exports an adapter, and this model carries none; give a RUN"
            )
        if any(True for _ in factored_layers(loaded.model)):
            raise GraftError(f"--to peft: {FACTORED_BASE}")
        if origin.base_changes is not None:
            raise GraftError(
                f"--to peft exports low-rank updates, and this run's base is its own: it has "
                f"{origin.base_changes}. On {origin.base} they would compute something else; "
                "export the whole model (--to hf), or keep the adapter that was adopted"
            )
        # What makes up for a rounding belongs on the rounded weights, which the run holds.
        own = STARTS[origin.init].changes_base
        base = str(loaded.folder) if own else origin.base or str(loaded.folder)
        save_adapter(loaded.model, path, names[0], base=base, as_lora=True, init=origin.init)
        note = STARTS[origin.init].export_note(base)
        return () if note is None else (note,)

    def usage(self, file: str, base: str | None) -> Usage:
        return Usage(
            "In this folder, on the base that it was trained on:",
            "python",
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            "base = AutoModelForCausalLM.from_pretrained("
            f"{json.dumps(base or 'PATH/TO/THE/BASE')})\n"
            'model = PeftModel.from_pretrained(base, ".")',
        )


PEFT = PeftTarget()
