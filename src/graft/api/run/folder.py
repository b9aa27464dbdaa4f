"""The folder of a run, and how a model is loaded back from it; see `layout`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from graft.adapters.registry import method_of
from graft.api.config import TrainConfig
from graft.api.run.adopted import base_changes
from graft.api.run.layout import (
    ADAPTER,
    BASE,
    BASE_REFERENCE,
    CONFIG,
    MODEL,
    PROMPT,
    TOKENIZER,
)
from graft.api.run.status import unfinished
from graft.api.settings import stored_settings
from graft.data.chat import DEFAULT_CHAT_TEMPLATE
from graft.data.shapes.registry import PLAIN, SHAPES
from graft.errors import GraftError, raise_problems
from graft.files.digest import file_digest
from graft.files.read import open_regular, read_bytes, read_typed
from graft.files.write import write_json
from graft.layers.activations import check_activations, compute_with, formats_of
from graft.layers.config import Activations
from graft.model.adapter_files import check_adapter_file, load_adapter
from graft.model.folder import CONFIG_FILE, QUANTISATION_FILE, check_weights, read_tokenizer
from graft.model.gguf.file import read_gguf
from graft.model.gguf.load import load_gguf_model
from graft.model.gguf.tokenizer import make_tokenizer
from graft.model.gguf.tokens import read_tokens
from graft.model.gguf.words import check_tokens
from graft.model.load import LoadedModel, load_model
from graft.model.subject import open_subject
from graft.model.targets import freeze_layers, select_targets, thaw_layers
from graft.text import quoted

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.jinja"),
    "additional_chat_templates/*.jinja",
)


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run."""
    return (path / CONFIG).is_file()


def read_run_config(run: Path) -> TrainConfig:
    """Return the resolved configuration of a run; raises GraftError when it is damaged."""
    settings = stored_settings(run / CONFIG, TrainConfig)
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
    chat_template: str | None = None
    """The template's text, where one was chosen that is not the tokenizer's own."""


def write_prompt_style(run: Path, style: PromptStyle) -> None:
    """Write prompt.json into a run's folder."""
    write_json(run / PROMPT, asdict(style))


def prompt_style(path: Path) -> PromptStyle:
    """Return the style of a run's prompts; any other model takes text as it is."""
    if not is_run(path):
        return PromptStyle()
    style = read_typed(path / PROMPT, PromptStyle)
    raise_problems(
        [] if style.kind in SHAPES else [f"kind is {quoted(style.kind)}"], str(path / PROMPT)
    )
    return style


def load_any(
    path: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    with_adapter: bool = True,
) -> LoadedModel:
    """Load a base folder or hub id, a quantised or merged folder, a RUN folder, or a GGUF file.

    A RUN gives its base with the trained adapter active, or, without `with_adapter`, as it was
    before training; a GGUF file that graft wrote needs the
    folder of a tokenizer. Trust in a model's own code is the caller's alone, whatever a run was
    trained with. Raises GraftError when it is none of them or is not whole.
    """
    folder = Path(path)
    if folder.suffix == ".gguf":
        return _load_gguf(folder, dtype, tokenizer)
    if not is_run(folder):
        return load_model(
            str(path), dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
    config = dataclasses.replace(read_run_config(folder), trust_remote_code=trust_remote_code)
    if dtype == "exact" and base_changes(folder):
        dtype = "float32"  # which what an adapter brought for a 16-bit base may need
    if not with_adapter:
        if method_of(config).adapter is None:
            raise GraftError(
                f"{folder} trained the weights themselves and has no adapter to leave out; its "
                f"base is {config.model}"
            )
        loaded = load_run_base(folder, config, dtype, device)
        thaw_layers(loaded.model)
    elif (folder / MODEL).is_dir():
        loaded = load_model(
            str(folder / MODEL), dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
    elif not (folder / ADAPTER).is_dir():
        raise GraftError(unfinished(folder))
    else:
        check_adapter_file(folder / ADAPTER)
        loaded = load_run_base(folder, config, dtype, device)
        load_adapter(loaded.model, folder / ADAPTER)
    if with_adapter:
        compute_with(loaded.model, config.activations or "float")
    return with_template(loaded, folder)


def round_inputs(loaded: LoadedModel, activations: Activations | None) -> None:
    """Let a model compute with what was asked for; None leaves it as it is.

    Raises GraftError when none of its weights meet rounded inputs.
    """
    check_activations(activations, formats_of(loaded.model))
    if activations is not None:
        compute_with(loaded.model, activations)


def with_template(loaded: LoadedModel, run: Path) -> LoadedModel:
    """Give a model's tokenizer the chat template that the run was trained with.

    What there is to tell of its base was told when it was trained.
    """
    loaded = dataclasses.replace(loaded, notes=())
    style = prompt_style(run)
    if style.chat_template is not None:
        loaded.tokenizer.chat_template = style.chat_template
    elif SHAPES[style.kind].is_conversation and loaded.tokenizer.chat_template is None:
        loaded.tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return loaded


def _load_gguf(path: Path, dtype: str, tokenizer: str | None) -> LoadedModel:
    tokens, notes = read_tokens(read_gguf(path)), list[str]()
    if tokenizer is not None:
        words = read_tokenizer(Path(tokenizer))
        notes = [] if tokens is None else check_tokens(tokens, words, path)
    elif tokens is not None:
        words = make_tokenizer(tokens, path)
    else:
        raise GraftError(f"{path}: give the folder of its tokenizer too (--tokenizer)")
    compute = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    model = load_gguf_model(path, compute)
    return LoadedModel(model, words, path, torch.float32, compute, notes=tuple(notes))


def load_run_base(
    run: Path, config: TrainConfig, dtype: str = "auto", device: str = "auto"
) -> LoadedModel:
    """Load the base of a run as it was trained on, without its adapter, ready for one.

    Raises GraftError when it is not byte for byte the one that was trained on.
    """
    dtype = config.dtype if dtype == "auto" else dtype
    adapts = method_of(config).trains_adapter
    if (run / BASE).is_dir():
        _check_base(run)
        loaded = load_model(
            str(run / BASE),
            dtype=dtype,
            device=device,
            trust_remote_code=config.trust_remote_code,
            trains_whole=not adapts,
        )
        if adapts:  # beside layers that are dense, too
            freeze_layers(loaded.model, select_targets(loaded.model, config.targets))
        return with_template(loaded, run)
    reference = read_base_reference(run)
    base = Path(reference.path)
    if not base.is_dir():
        raise GraftError(f"the base of {run} is gone: there is no folder {base}")
    found = _sampled(base) if reference.sha256 is None else fingerprint_weights(base)
    if found != (reference.sha256 or reference.fingerprint):
        raise GraftError(f"the base of {run} has changed since: {base} has other weights now")
    subject = open_subject(
        str(base),
        config.trust_remote_code,
        ties_as_stated=not reference.parted,
        tokenizer_folder=run / TOKENIZER if (run / TOKENIZER).is_dir() else None,
    )
    loaded = load_model(subject, dtype=dtype, device=device, trains_whole=not adapts)
    if adapts:
        freeze_layers(loaded.model, select_targets(loaded.model, config.targets))
    return with_template(loaded, run)


def _check_base(run: Path) -> None:
    """Raise GraftError when the base in a run's folder is not what was written there."""
    if (run / BASE / QUANTISATION_FILE).is_file() or not (run / BASE_REFERENCE).is_file():
        check_weights(run / BASE)
    elif fingerprint_weights(run / BASE) != read_base_reference(run).sha256:
        raise GraftError(f"the base of {run} has changed since: {run / BASE} has other weights now")


@dataclass(frozen=True)
class BaseReference:
    """Where a run's base lies, and what it is."""

    path: str
    fingerprint: str | None = None
    """Of earlier versions; see `_sampled`."""
    sha256: str | None = None
    """See `fingerprint_weights`."""
    parted: bool = False
    """It was trained with a head of its own that config.json ties to the embedding; earlier
    versions tied it then."""


def write_base_reference(run: Path, folder: Path, parted: bool) -> None:
    """Write base.json: where the base lies, its fingerprint, and whether its head is its own."""
    path = BASE if folder == run / BASE else str(folder.resolve())
    reference = {"path": path, "sha256": fingerprint_weights(folder)}
    write_json(run / BASE_REFERENCE, reference | ({"parted": True} if parted else {}))


def read_base_reference(run: Path) -> BaseReference:
    """Return what base.json says; raises GraftError when it is damaged."""
    return read_typed(run / BASE_REFERENCE, BaseReference)


def fingerprint_weights(folder: Path) -> str:
    """Return a SHA-256 over config.json, graft.json and every weight file, each read whole.

    Raises GraftError when one of them cannot be read.
    """
    files = [folder / CONFIG_FILE, folder / QUANTISATION_FILE, *folder.glob("*.safetensors")]
    digests = {path.name: file_digest(path) for path in files if path.exists()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def fingerprint_tokenizer(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a model's tokenizer that is there, by its name.

    Raises GraftError when one of them cannot be read.
    """
    files = sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)})
    return {path.name: file_digest(path) for path in files if path.exists()}


def _sampled(folder: Path) -> str:
    """Return the fingerprint of earlier versions: config.json, and samples of the weight files."""
    digest = hashlib.sha256(read_bytes(folder / CONFIG_FILE))
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with open_regular(path) as file:
            for position in range(0, size, max(1 << 16, size // 64)):
                file.seek(position)
                digest.update(file.read(1 << 12))
    return digest.hexdigest()
