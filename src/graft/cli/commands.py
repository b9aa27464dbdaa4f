"""The subcommands: flags to a call of the API, and its result to the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from graft.api.config import QuantizeConfig, TrainConfig
from graft.cli.adopt import adopt
from graft.cli.convert import convert
from graft.cli.flags import parse, parse_with_file
from graft.export.config import ExportTarget

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Loss and perplexity of a model, masked as in training."""

    model: tyro.conf.Positional[str]
    """A run, a model folder, a hub id, or a GGUF file that graft wrote."""
    data: str
    """File of examples."""
    max_length: int | None = None
    """Most tokens in a row; default: the model's limit, at most 1024."""
    eos: bool = True
    """Score the end-of-sequence token too."""
    separator: str = "\n"
    """Text between prompt and completion."""
    batch_size: int = 16
    """Rows computed at once."""
    json: bool = False
    """Print one JSON object instead of text."""
    tokenizer: str | None = None
    """Folder of the tokenizer, for a GGUF file."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Continue a prompt."""

    model: tyro.conf.Positional[str]
    """A run, a model folder, a hub id, or a GGUF file that graft wrote."""
    prompt: str
    """The prompt; to a run it is dressed as the run's training rows were."""
    max_new_tokens: int = 128
    """Most tokens to generate."""
    temperature: float = 0.0
    """0 is greedy; higher samples more freely."""
    seed: int = 0
    """Seed of the sampling."""
    raw: bool = False
    """Take the prompt as it is, without the run's separator or template."""
    tokenizer: str | None = None
    """Folder of the tokenizer, for a GGUF file."""


@dataclass(frozen=True, kw_only=True)
class ChatArguments:
    """Talk to a model; an empty line or Ctrl-D ends it."""

    model: tyro.conf.Positional[str]
    """A run, a model folder, or a hub id."""
    max_new_tokens: int = 256
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 is greedy; higher samples more freely."""


@dataclass(frozen=True, kw_only=True)
class MergeArguments:
    """Fold a run's adapter into a model folder, with merge-report.json in it."""

    run: tyro.conf.Positional[str]
    """The run's folder."""
    out: str
    """Folder to write."""
    into: Literal["trained", "original"] = "trained"
    """The base that was trained on (dequantised for qlora), or the original one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Stored dtype of weights that become dense; auto is the source's."""


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write a run or a model for another program."""

    model: tyro.conf.Positional[str]
    """A run or a model folder."""
    to: ExportTarget
    """gguf: llama.cpp; ollama: the same file and a Modelfile; mlx: mlx-lm; onnx: ONNX Runtime;
    openvino: OpenVINO; hf: Transformers, dequantised; peft: the adapter alone (of lora, qlora, and
    qalora with --grid-rank 0)."""
    out: str
    """File (gguf) or folder to write."""
    requantize: bool = False
    """Round a lora or qlora run to INT4 (all but hf); the loss that this costs is printed."""
    license: str | None = None
    """Licence on the model card, as the hub names it; default: that on the base's card."""


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Load an exported file in its own runtime, and compare it with the model that was trained."""

    model: tyro.conf.Positional[str]
    """The run or model folder that was exported."""
    file: tyro.conf.Positional[str]
    """The .gguf file, or the folder of --to ollama, mlx, onnx, openvino or hf."""
    data: str | None = None
    """Held-out examples to compare on; by default those of the run."""
    requantize: bool = False
    """Whether the export was asked to round a lora or qlora run."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """Fine-tune the bundled model on the bundled data, merge, export, and compare."""

    out: str = "graft-demo"
    """Folder to write."""


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """Say which kernels compute here and why the others do not; processor, memory, versions."""

    json: bool = False
    """Print one JSON object instead of text."""


def train(words: Sequence[str]) -> None:
    """Graft train [CONFIG.yaml] --model M --data D --method X --out RUN."""
    given = _settings_of_resumed_run(words)
    config = parse_with_file(TrainConfig, words, "train", "Fine-tune a model.", given)
    from graft.api.finetune import finetune
    from graft.cli.progress import TerminalEvents

    console = Console(stderr=True)
    with TerminalEvents(console) as events:
        report = finetune(config, events)
    out = Path(config.out)
    print(
        f"held-out loss {report.eval_loss_before:.4f} → {report.eval_loss:.4f}, perplexity "
        f"{report.perplexity:.4f}, {report.steps} steps in {report.seconds:.0f} s\n"
        f"peak memory {report.peak_memory_bytes / MIB:,.0f} MiB (planned "
        f"{report.planned_memory_bytes / MIB:,.0f} MiB)\n"
        f"report: {out / 'report.md'}, plot: {out / 'plots' / 'loss.png'}"
    )
    if config.method != "full":
        print(f"next: graft export {out} --to gguf --out {out.name}.gguf")


def _settings_of_resumed_run(words: Sequence[str]) -> dict[str, object]:
    """Return the stored settings of the run that --resume goes on with, so that --out is enough."""
    words = [part for word in words for part in word.split("=", 1)]
    if "--resume" not in words or "--out" not in words[:-1]:
        return {}
    from graft.api.settings import checked_settings
    from graft.files import read_yaml

    stored = Path(words[words.index("--out") + 1]) / "config.yaml"
    return checked_settings(read_yaml(stored), TrainConfig, str(stored)) if stored.is_file() else {}


def quantize(words: Sequence[str]) -> None:
    """Graft quantize --model M --format F --out DIR."""
    config = parse_with_file(QuantizeConfig, words, "quantize", "Write a quantised model folder.")
    from graft.api.quantize import quantize as run
    from graft.cli.progress import TerminalEvents

    with TerminalEvents(Console(stderr=True)) as events:
        out = run(config, events)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"{out}: {size / MIB:,.1f} MiB of weights")


def plan(words: Sequence[str]) -> None:
    """Graft plan --model M --method X: a table of memory; no weights are read."""
    from graft.api.config import PlanConfig

    config = parse_with_file(PlanConfig, words, "plan", "Predict the memory of a run.")
    from graft.api.plan import plan as run

    memory = run(config)
    if config.json:
        print(json.dumps(memory.as_dict(), indent=2))
        return
    table = Table(title=f"{config.method} on {config.model}")
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_column("note")
    for row in memory.table():
        table.add_row(*row)
    Console().print(table)
    print(f"checkpointing: {memory.checkpointing_reason}")


def evaluate(words: Sequence[str]) -> None:
    """Graft eval RUN_OR_MODEL --data D [--json]."""
    arguments = parse(EvalArguments, words, "eval", EvalArguments.__doc__ or "")
    from graft.api.evaluate import evaluate_model
    from graft.api.run.folder import load_any

    loaded = load_any(arguments.model, arguments.dtype, arguments.device, arguments.tokenizer)
    result = evaluate_model(
        loaded,
        arguments.data,
        max_length=arguments.max_length,
        eos=arguments.eos,
        separator=arguments.separator,
        batch_size=arguments.batch_size,
    )
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"loss {result['loss']:.4f}, perplexity {result['perplexity']:.4f} over "
        f"{result['target_tokens']:,} target tokens in {result['rows']:,} rows "
        f"({result['cut_rows']:,} cut)"
    )


def generate(words: Sequence[str]) -> None:
    """Graft generate RUN_OR_MODEL --prompt TEXT."""
    arguments = parse(GenerateArguments, words, "generate", GenerateArguments.__doc__ or "")
    from graft.api.evaluate import generate as run
    from graft.api.run.folder import load_any, prompt_style

    loaded = load_any(arguments.model, tokenizer=arguments.tokenizer)
    run(
        loaded,
        arguments.prompt,
        style=None if arguments.raw else prompt_style(Path(arguments.model)),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        on_text=_print_at_once,
    )
    print()


def chat(words: Sequence[str]) -> None:
    """Graft chat RUN_OR_MODEL."""
    arguments = parse(ChatArguments, words, "chat", ChatArguments.__doc__ or "")
    from graft.api.evaluate import generate as run
    from graft.api.run.folder import load_any, prompt_style
    from graft.data.shapes.registry import SHAPES

    loaded = load_any(arguments.model)
    style = prompt_style(Path(arguments.model))
    remembers = SHAPES[style.kind].is_conversation or loaded.tokenizer.chat_template is not None
    if not remembers:
        print("This model has no chat template: each line stands alone.", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while line := _ask():
        messages.append({"role": "user", "content": line})
        answer = run(
            loaded,
            messages if remembers else line,
            style=style,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            on_text=_print_at_once,
        )
        print()
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _print_at_once(text: str) -> None:
    print(text, end="", flush=True)


def merge(words: Sequence[str]) -> None:
    """Graft merge RUN --out DIR."""
    arguments = parse(MergeArguments, words, "merge", MergeArguments.__doc__ or "")
    from graft.api.merge import merge as run
    from graft.cli.progress import TerminalEvents

    with TerminalEvents(Console(stderr=True)) as events:
        report = run(
            arguments.run,
            arguments.out,
            into=arguments.into,
            dtype=arguments.dtype,
            events=events,
        )
    print(report.summary())
    print(f"{arguments.out}, with merge-report.json")


def export(words: Sequence[str]) -> None:
    """Graft export RUN_OR_MODEL --to gguf|ollama|mlx|onnx|openvino|hf|peft --out PATH."""
    arguments = parse(ExportArguments, words, "export", ExportArguments.__doc__ or "")
    from graft.api.export import export_model
    from graft.cli.progress import TerminalEvents

    with TerminalEvents(Console(stderr=True)) as events:
        report = export_model(
            arguments.model,
            arguments.to,
            arguments.out,
            requantize=arguments.requantize,
            license=arguments.license,
            events=events,
        )
    for note in report.notes:
        print(f"note: {note}")
    print(f"{report.path}: {report.bytes / MIB:,.1f} MiB")


def verify(words: Sequence[str]) -> None:
    """Graft verify RUN_OR_MODEL FILE [--data D]; fails where a bound is missed."""
    arguments = parse(VerifyArguments, words, "verify", VerifyArguments.__doc__ or "")
    from graft.cli.verify import show_certificate

    show_certificate(
        arguments.model,
        arguments.file,
        data=arguments.data,
        requantize=arguments.requantize,
        as_json=arguments.json,
    )


def compare(words: Sequence[str]) -> None:
    """Graft compare [CONFIG.yaml] --model M --data D [--contenders ...] [--out DIR], or --demo."""
    from graft.cli.compare import CompareArguments, demo_settings, show_comparison

    description = CompareArguments.__doc__ or ""
    given = demo_settings(words)
    show_comparison(parse_with_file(CompareArguments, words, "compare", description, given))


def demo(words: Sequence[str]) -> None:
    """Graft demo [--out DIR]."""
    arguments = parse(DemoArguments, words, "demo", DemoArguments.__doc__ or "")
    from graft.cli.demo import show_demo

    show_demo(Path(arguments.out))


def doctor(words: Sequence[str]) -> None:
    """Graft doctor [--json]."""
    arguments = parse(DoctorArguments, words, "doctor", DoctorArguments.__doc__ or "")
    from graft.api.doctor import diagnose
    from graft.cli.doctor import show_diagnosis

    diagnosis = diagnose()
    if arguments.json:
        print(json.dumps(diagnosis, indent=2))
    else:
        show_diagnosis(diagnosis)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": demo,
    "plan": plan,
    "convert": convert,
    "quantize": quantize,
    "train": train,
    "adopt": adopt,
    "eval": evaluate,
    "generate": generate,
    "chat": chat,
    "merge": merge,
    "export": export,
    "verify": verify,
    "compare": compare,
    "doctor": doctor,
}
