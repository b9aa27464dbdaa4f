"""The folder of a run, and how a model is loaded back from it; see `layout`."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from graft.adapters.registry import method_of
from graft.api.config import TrainConfig
from graft.api.run.layout import ADAPTER, BASE, BASE_REFERENCE, CONFIG, MODEL, PROMPT, REPORT
from graft.api.settings import checked_settings
from graft.data.chat import DEFAULT_CHAT_TEMPLATE
from graft.data.shapes.registry import PLAIN, SHAPES
from graft.errors import GraftError
from graft.files.read import read_json, read_yaml
from graft.files.write import write_json
from graft.model.adapter_files import load_adapter
from graft.model.folder import read_tokenizer
from graft.model.gguf.load import load_gguf_model
from graft.model.load import LoadedModel, load_model
from graft.model.targets import freeze_layers, select_targets


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run."""
    return (path / CONFIG).is_file()


def read_run_config(run: Path) -> TrainConfig:
    """Return the resolved configuration of a run; raises GraftError when it is damaged."""
    written = read_yaml(run / CONFIG)
    # Version 0.1.0 knew two of today's choices under another name.
    recomputes = written.pop("gradient_checkpointing", None)
    if recomputes is not None:
        written["checkpointing"] = "layers" if recomputes else "none"
    settings = checked_settings(written, TrainConfig, str(run / CONFIG))
    try:
        config = TrainConfig(**settings)
        return dataclasses.replace(config, **method_of(config).unsaid(settings))
    except TypeError as error:
        raise GraftError(f"{run / CONFIG}: {error}") from error


@dataclass(frozen=True)
class PromptStyle:
    """How a user's prompt is dressed so that it equals what training put before the answer."""

    kind: str = PLAIN
    separator: str = "\n"


def write_prompt_style(run: Path, style: PromptStyle) -> None:
    """Write prompt.json into a run's folder."""
    write_json(run / PROMPT, asdict(style))


def prompt_style(path: Path) -> PromptStyle:
    """Return the style of a run's prompts; any other model takes text as it is."""
    if not is_run(path):
        return PromptStyle()
    stored = read_json(path / PROMPT)
    return PromptStyle(str(stored["kind"]), stored["separator"])


def load_any(
    path: str | Path, dtype: str = "auto", device: str = "auto", tokenizer: str | None = None
) -> LoadedModel:
    """Load a base folder or hub id, a quantised or merged folder, a RUN folder, or a GGUF file.

    A RUN gives its base with the trained adapter active; a GGUF file that graft wrote needs the
    folder of a tokenizer. Raises GraftError when it is none of them or is not whole.
    """
    folder = Path(path)
    if folder.suffix == ".gguf":
        return _load_gguf(folder, dtype, tokenizer)
    if not is_run(folder):
        return load_model(str(path), dtype=dtype, device=device)
    config = read_run_config(folder)
    if (folder / MODEL).is_dir():
        return load_model(str(folder / MODEL), dtype=dtype, device=device)
    if not (folder / ADAPTER).is_dir():
        raise GraftError(
            f"{folder} is a run that did not finish: it has no adapter yet; go on with "
            f"graft train --resume --out {folder}"
        )
    loaded = load_run_base(folder, config, dtype, device)
    load_adapter(loaded.model, folder / ADAPTER)
    shape = SHAPES[prompt_style(folder).kind]
    if shape.is_conversation and loaded.tokenizer.chat_template is None:
        loaded.tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return loaded


def _load_gguf(path: Path, dtype: str, tokenizer: str | None) -> LoadedModel:
    if tokenizer is None:
        raise GraftError(f"{path}: give the folder of its tokenizer too (--tokenizer)")
    compute = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    model = load_gguf_model(path, compute)
    return LoadedModel(model, read_tokenizer(Path(tokenizer)), path, torch.float32, compute)


def load_run_base(
    run: Path, config: TrainConfig, dtype: str = "auto", device: str = "auto"
) -> LoadedModel:
    """Load the base of a run as it was trained on, without its adapter, ready for one."""
    dtype = config.dtype if dtype == "auto" else dtype
    if (run / BASE).is_dir():
        return load_model(
            str(run / BASE), dtype=dtype, device=device, trust_remote_code=config.trust_remote_code
        )
    reference = read_json(run / BASE_REFERENCE)
    base = Path(str(reference["path"]))
    if not base.is_dir():
        raise GraftError(f"the base of {run} is gone: there is no folder {base}")
    if fingerprint_weights(base) != reference["fingerprint"]:
        raise GraftError(f"the base of {run} has changed since: {base} has other weights now")
    loaded = load_model(
        str(base), dtype=dtype, device=device, trust_remote_code=config.trust_remote_code
    )
    if method_of(config).trains_adapter:
        freeze_layers(loaded.model, select_targets(loaded.model, config.targets))
    return loaded


def write_base_reference(run: Path, folder: Path) -> None:
    """Write base.json: where the base lies, and its fingerprint."""
    write_json(
        run / BASE_REFERENCE,
        {"path": str(folder.resolve()), "fingerprint": fingerprint_weights(folder)},
    )


def fingerprint_weights(folder: Path) -> str:
    """Return a SHA-256 over config.json and over size, head and samples of every weight file.

    It takes milliseconds for any size of model; it tells other weights from these, not a malicious
    change from an honest one.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for position in range(0, size, max(1 << 16, size // 64)):
                file.seek(position)
                digest.update(file.read(1 << 12))
    return digest.hexdigest()


def run_summary(run: Path) -> dict[str, Any]:
    """Return the report of a finished run; raises GraftError when there is none."""
    return read_json(run / REPORT)
