"""What other tools call a setting: Trainer, PEFT, TRL, axolotl, LLaMA-Factory, mlx-lm, unsloth.

A name whose values mean exactly what ours do is understood, and said once. Any other is answered
with what to give here instead. Names are compared without regard to case, dashes and underscores.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graft.data.sources.hub import HUB

SAME: Mapping[str, str] = {
    # the model and the data
    "model_name_or_path": "model",
    "pretrained_model_name_or_path": "model",
    "model_name": "model",
    "model_id": "model",
    "base_model": "model",
    "train_file": "data",
    "train_data": "data",
    "training_data": "data",
    "data_path": "data",
    "data_file": "data",
    "dataset": "data",
    "dataset_name": "data",
    "dataset_path": "data",
    "validation_file": "eval_data",
    "eval_file": "eval_data",
    "val_file": "eval_data",
    "valid_file": "eval_data",
    "val_data": "eval_data",
    "validation_data": "eval_data",
    "eval_dataset": "eval_data",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "max_sequence_length": "max_length",
    "sequence_len": "max_length",
    "sequence_length": "max_length",
    "seq_length": "max_length",
    "seq_len": "max_length",
    "cutoff_len": "max_length",
    "model_max_length": "max_length",
    # the adapter
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "target_modules": "targets",
    "lora_target": "targets",
    "lora_target_modules": "targets",
    "bnb_4bit_use_double_quant": "double_quant",
    "use_bnb_nested_quant": "double_quant",
    "use_nested_quant": "double_quant",
    # the training
    "output_dir": "out",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "per_gpu_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "grad_accumulation_steps": "grad_accum",
    "accumulate_grad_batches": "grad_accum",
    "lr": "learning_rate",
    "warmup_ratio": "warmup_fraction",
    "clip_grad_norm": "max_grad_norm",
    "gradient_clip_val": "max_grad_norm",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "early_stopping_patience": "patience",
    "early_stopping_threshold": "min_improvement",
}
"""Another name, and the setting of ours whose values mean the same."""

_LEAVE_OUT = "leave it out"
_SCHEDULE = (
    "the learning rate rises over --warmup-fraction of the steps, then falls as a cosine to 0"
)
_FOUR_BITS = "--method qlora trains LoRA on weights in 4-bit NormalFloat; --format says another one"
_ATTENTION = f"graft chooses how attention is computed; {_LEAVE_OUT}"
_TEXT = "give --columns text=COLUMN"
_HELD_OUT = "give the share of the rows that is held out with --eval-fraction, 0 to 1"
_METHOD = "give --method: lora, qlora, qalora, merge_aware, affine or full"
_LAYERS = r"give --targets a regular expression, such as '.*layers\.(30|31)\..*'"
_CHECKPOINTING = "give --checkpointing layers; auto, the default, takes what fits"
_PACKING = "give --batching packed, where no row sees another; auto, the default, packs if it can"
_ONE_MACHINE = f"graft computes on one machine and one device, which --device names; {_LEAVE_OUT}"
_UPLOADS = f"graft uploads nothing; {_LEAVE_OUT}, and upload what graft export writes"
_METRICS = f"metrics.jsonl in the run's folder has every step; {_LEAVE_OUT}"
_MASK = (
    "never the prompt, only the completion or the assistant's turns are trained, but every token "
    f"of text rows; {_LEAVE_OUT}"
)
_TOKENS = "it is read from the tokenizer's own files; set it there (tokenizer_config.json)"
_KEEPS_BEST = "--keep best, the default, ends with the best evaluation's parameters"
_STEPS = "give optimizer steps with --steps: batches divided by --grad-accum"

INSTEAD: Mapping[str, str] = {
    # the data
    "datasets": "give a file, a folder or a .yaml mixture of several with --data",
    "dataset_config": "give the file itself with --data",
    "dataset_text_field": _TEXT,
    "text_column": _TEXT,
    "prompt_template": "write prompt and completion into the rows of --data",
    "template": "the tokenizer's chat template is taken; --chat-template names another one",
    "chat_template_path": "give --chat-template FILE.jinja, or the name of one of the tokenizer's",
    "streaming": f"rows lie on the disk and not in memory; {_LEAVE_OUT}",
    "preprocessing_num_workers": f"graft reads the rows of --data itself; {_LEAVE_OUT}",
    "val_set_size": _HELD_OUT,
    "val_size": _HELD_OUT,
    "test_size": _HELD_OUT,
    "validation_split_percentage": "give the share of the rows with --eval-fraction: 5 % is 0.05",
    "block_size": "rows are not joined to blocks; give the most tokens of a row with --max-length",
    "train_on_inputs": _MASK,
    "train_on_input": _MASK,
    "train_on_prompt": _MASK,
    "mask_prompt": _MASK,
    "completion_only_loss": _MASK,
    "assistant_only_loss": _MASK,
    "add_eos_token": "the end of sequence is trained; --no-eos leaves it out",
    "eos_token": _TOKENS,
    "pad_token": _TOKENS,
    "special_tokens": _TOKENS,
    "padding_side": f"padding is masked by position on either side; {_LEAVE_OUT}",
    "remove_unused_columns": f"columns that nothing reads are never in the way; {_LEAVE_OUT}",
    "data_seed": "--seed decides the order of the rows and what is held out",
    # the adapter and the weights
    "use_peft": "an adapter is what every --method but full trains",
    "use_lora": "give --method lora",
    "finetuning_type": _METHOD,
    "fine_tune_type": _METHOD,
    "peft_type": _METHOD,
    "adapter": _METHOD,
    "task_type": f"graft trains causal language models; {_LEAVE_OUT}",
    "bias": "for 'none' leave it out; --adapter-bias trains a bias beside the low-rank update",
    "lora_bias": "--adapter-bias trains a bias beside the low-rank update",
    "init_lora_weights": "--init says how the adapter starts; True is default",
    "eva_config": "give --init eva, and --eva-rho for its rho",
    "corda_config": "give --init corda",
    "loftq_config": "give --init loftq, and --loftq-rounds for its iterations",
    "modules_to_save": "--method full with --targets trains chosen layers whole, and no adapter",
    "lora_modules_to_save": "--method full with --targets trains chosen layers whole",
    "lora_target_linear": "every linear layer but the head is adapted unless --targets names some",
    "layers_to_transform": _LAYERS,
    "lora_layers": _LAYERS,
    "num_layers": _LAYERS,
    "lora_scale": "the scaling is alpha / rank: give --alpha, the scale times the rank",
    "load_in_4bit": _FOUR_BITS,
    "use_4bit": _FOUR_BITS,
    "quantization": _FOUR_BITS,
    "quantization_bit": _FOUR_BITS,
    "bnb_4bit_quant_type": "give --format nf4 or --format fp4 (with --method qlora)",
    "bnb_4bit_compute_dtype": "give --dtype bfloat16 or --dtype float32",
    "load_in_8bit": "give --method lora --format int8",
    "bf16": "give --dtype bfloat16, which --dtype auto takes for a 16-bit checkpoint",
    "fp16": "graft computes in bfloat16 or float32, not in float16: give --dtype",
    "half": "graft computes in bfloat16 or float32, not in float16: give --dtype",
    "tf32": f"graft does not compute in TF32; {_LEAVE_OUT}, or give --dtype bfloat16",
    "torch_dtype": "give --dtype auto, bfloat16 or float32",
    "model_dtype": "give --dtype auto, bfloat16 or float32",
    "precision": "give --dtype auto, bfloat16 or float32",
    # the training
    "iters": _STEPS,
    "max_iters": _STEPS,
    "warmup_steps": "give a share of all steps with --warmup-fraction: warm-up steps / --steps",
    "num_warmup_steps": "give a share of all steps with --warmup-fraction: warm-up steps / --steps",
    "lr_scheduler": _SCHEDULE,
    "lr_scheduler_type": _SCHEDULE,
    "scheduler": _SCHEDULE,
    "optim": "give --optimizer adamw, which is the default",
    "gradient_checkpointing": _CHECKPOINTING,
    "use_gradient_checkpointing": _CHECKPOINTING,
    "grad_checkpoint": _CHECKPOINTING,
    "per_device_eval_batch_size": "held-out rows are computed --batch-size at once too",
    "eval_batch_size": "held-out rows are computed --batch-size at once too",
    "val_batches": "all held-out rows are evaluated; --eval-fraction says how many there are",
    "eval_strategy": "give --eval-every STEPS or --eval-epochs PASSES",
    "evaluation_strategy": "give --eval-every STEPS or --eval-epochs PASSES",
    "evals_per_epoch": "give --eval-epochs: passes between two evaluations, 0.25 for 4 in a pass",
    "steps_per_eval": "give optimizer steps between evaluations with --eval-every",
    "save_strategy": "give --save-every STEPS; without it --save-minutes decides",
    "saves_per_epoch": "give --save-every STEPS",
    "save_total_limit": f"the last two checkpoints are kept (--save-every); {_LEAVE_OUT}",
    "load_best_model_at_end": _KEEPS_BEST,
    "metric_for_best_model": _KEEPS_BEST,
    "resume_from_checkpoint": "--resume goes on with the run in --out, from its newest checkpoint",
    "resume_adapter_file": "--resume goes on with the run in --out, from its newest checkpoint",
    "overwrite_output_dir": "a run is never overwritten: remove its folder, or give another --out",
    "adapter_path": "give the run's folder with --out",
    "save_path": "give the run's folder with --out",
    "save_gguf": "give --export gguf",
    "logging_steps": _METRICS,
    "logging_strategy": _METRICS,
    "steps_per_report": _METRICS,
    "report_to": "give --track tensorboard, or nothing: metrics.jsonl has every step",
    "wandb_project": "give --track tensorboard, or nothing: metrics.jsonl has every step",
    "do_train": f"graft train trains; {_LEAVE_OUT}",
    "do_eval": "held-out rows are always evaluated; --eval-every says how often",
    "group_by_length": "give --batching grouped; auto, the default, packs where the model can",
    "packing": _PACKING,
    "sample_packing": _PACKING,
    "neat_packing": _PACKING,
    "use_packing": _PACKING,
    "padding_free": _PACKING,
    "dataloader_num_workers": f"graft reads the rows of --data itself; {_LEAVE_OUT}",
    "dataset_num_proc": f"graft reads the rows of --data itself; {_LEAVE_OUT}",
    "attn_implementation": _ATTENTION,
    "flash_attention": _ATTENTION,
    "flash_attn": _ATTENTION,
    "use_flash_attn": _ATTENTION,
    "use_flash_attention_2": _ATTENTION,
    "device_map": "give --device auto, cpu, cuda or mps",
    "use_cpu": "give --device cpu",
    "no_cuda": "give --device cpu",
    "deepspeed": _ONE_MACHINE,
    "fsdp": _ONE_MACHINE,
    "local_rank": _ONE_MACHINE,
    "push_to_hub": _UPLOADS,
    "hub_model_id": _UPLOADS,
}
"""Another name, and what to give here instead, in words that name our flags."""

REFUSED_VALUES: Mapping[str, Mapping[str, str]] = {
    "targets": {
        "all-linear": "leave it out: every linear layer but the head is adapted",
        "all": "leave it out: every linear layer but the head is adapted",
    },
    "steps": {"-1": "leave it out, and --epochs decides"},
}
"""Values that under another name mean something special, by the setting of ours."""

_FLAG = re.compile(r"--([a-z][a-z-]*)")


@dataclass(frozen=True)
class Answer:
    """What another tool's name is here: ours, or advice in words."""

    ours: str | None
    advice: str = ""


def canonical(name: str) -> str:
    """Return a flag's or key's name as this table and configurations write it."""
    return name.strip().replace("-", "_").lower()


def answer(name: str, known: Collection[str]) -> Answer | None:
    """Return what a name of another tool is for a command that has the settings `known`.

    None where it is nothing that this table, or that command, knows.
    """
    plain = canonical(name)
    if plain in SAME:
        return Answer(SAME[plain]) if SAME[plain] in known else None
    advice = INSTEAD.get(plain)
    if advice is None:
        return None
    named = flags_named(advice)
    return Answer(None, advice) if not named or set(named) & set(known) else None


def flags_named(advice: str) -> list[str]:
    """Return the settings that an advice names as flags, each as a field is written."""
    names = (found.removeprefix("no-") for found in _FLAG.findall(advice))
    return [name.replace("-", "_") for name in names]


def refused_value(ours: str, values: Sequence[str]) -> str | None:
    """Return what to do instead of giving such values under another tool's name, or None."""
    special = REFUSED_VALUES.get(ours, {})
    return next((special[value] for value in values if value in special), None)


def values_here(theirs: str, ours: str, values: Sequence[str]) -> list[str]:
    """Return values under another tool's name as ours are written.

    A list of layers may be one word there, q_proj,v_proj or [q, v]; a regular expression, in which
    a comma may stand, is left as it is. A data set without a file is one of the hub.
    """
    if canonical(theirs.lstrip("-")) in _ON_THE_HUB:
        return [value if _is_file(value) else f"{HUB}{value}" for value in values]
    if ours != "targets":
        return list(values)
    found: list[str] = []
    for value in values:
        inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
        parts = [value] if set("{}[]()\\") & set(inner) else inner.split(",")
        found += [part for part in (one.strip("'\" ") for one in parts) if part]
    return found


_ON_THE_HUB = ("dataset", "dataset_name")


def _is_file(value: str) -> bool:
    """Return whether data are named by their place, and not by their name on the hub."""
    return value.startswith(HUB) or bool(Path(value).suffix) or Path(value).exists()


def understood_note(pairs: Mapping[str, str]) -> str:
    """Return the sentence that tells once which names of other tools were understood."""
    return "; ".join(f"{theirs} is {ours} here" for theirs, ours in pairs.items())
