"""What the settings of GPTQ, AWQ and auto-round folders say, wherever the tool put them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graft.errors import raise_problems
from graft.files.read import read_json
from graft.model.weight_files import WeightFiles
from graft.text import listed, quoted

GPTQ_FILE = "quantize_config.json"
AWQ_FILE = "quant_config.json"
_AWQ_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}

_READ = frozenset(
    {
        *("quant_method", "method", "bits", "group_size", "sym", "desc_act", "static_groups"),
        *("checkpoint_format", "format", "version", "packing_format", "backend", "zero_point"),
        *("dynamic", "extra_config", "data_type", "act_bits", "pack_dtype"),
    }
)
_CHANGES_NOTHING = frozenset(
    {
        # Which layers are quantised, which their tensors say.
        *("modules_to_not_convert", "modules_in_block_to_quantize", "block_name_to_quantize"),
        *("to_quant_block_names", "quant_block_list", "lm_head", "supported_types"),
        *("module_name_preceding_first_block", "inside_layer_modules", "outside_layer_modules"),
        # How codes and scales were found.
        *("damp_percent", "damp_auto_increment", "true_sequential", "mse", "v2", "v2_alpha"),
        *("v2_memory_device", "gptaq", "act_group_aware", "hyb_act", "failsafe", "fallback"),
        *("dataset", "tokenizer", "batch_size", "pad_token_id", "model_seqlen", "nsamples"),
        *("seqlen", "iters", "lr", "minmax_lr", "enable_quanted_input", "enable_quant_input"),
        *("enable_minmax_tuning", "enable_norm_bias_tuning", "enable_alg_ext", "amp", "momentum"),
        *("not_use_best_mse", "dynamic_max_gap", "gradient_accumulate_steps", "low_gpu_mem_usage"),
        *(
            "low_cpu_mem_usage",
            "use_quant_input",
            "enable_full_range",
            "sampler",
            "disable_opt_rtn",
        ),
        *("super_sym", "neuqi", "disable_opt_rtn", "hessian", "moe", "offload_to_disk"),
        # Who computes with them, and where.
        *("use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16", "max_input_length"),
        *("cache_block_outputs", "parallel_packing", "device", "pack_impl", "do_fuse"),
        *("fuse_max_seq_len", "modules_to_fuse", "compute_dtype", "scale_dtype", "model_dtype"),
        *("act_dynamic", "act_group_size", "act_sym", "act_data_type"),
        # Who wrote them.
        *("meta", "quantizer", "provider", "autoround_version", "model_name_or_path", "uri"),
        *("model_file_base_name", "awq_gemm_checkpoint"),
    }
)


def separate_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the settings of a file of their own, and its name; older folders have such.

    AutoGPTQ writes quantize_config.json, AutoAWQ quant_config.json with other names of its keys.
    Raises GraftError when the file is damaged.
    """
    for name in (GPTQ_FILE, AWQ_FILE):
        if (folder / name).is_file():
            found = read_json(folder / name)
            is_awq = name == AWQ_FILE or bool(_AWQ_NAMES.keys() & found.keys())
            named = {_AWQ_NAMES.get(key, key): value for key, value in found.items()}
            return {"quant_method": "awq" if is_awq else "gptq"} | named, name
    return {}, ""


def settings_by_tensors(files: WeightFiles) -> dict[str, Any]:
    """Return the tool that the names and shapes of the tensors show, or nothing."""
    for key in files:
        name = key.removesuffix(".qweight")
        parts = [f"{name}.{part}" for part in ("qweight", "qzeros", "scales")]
        if name == key or not all(part in files for part in parts):
            continue
        codes, zeros, scales = map(files.shape, parts)
        if not len(codes) == len(zeros) == len(scales) == 2:
            continue
        if codes[1] == scales[1]:
            return {"quant_method": "gptq"}
        if codes[1] == zeros[1] and zeros[0] == scales[0]:
            return {"quant_method": "awq", "version": "gemm"}
    return {}


def check_settings(where: str, settings: dict[str, Any]) -> list[str]:
    """Return notes on settings that are not read; raises GraftError for what changes the weights.

    where: the folder, for the error.
    """
    problems = _problems(settings, "")
    for key in ("dynamic", "extra_config"):
        layers = settings.get(key) or {}
        if not isinstance(layers, dict):
            problems.append(f"{key} is {quoted(layers)}; expected settings by layer")
            continue
        for name, own in layers.items():
            if isinstance(own, dict):
                problems += _problems(own, f"{key}, {quoted(name)}: ")
    raise_problems(problems, where)
    known = _READ | _CHANGES_NOTHING | _CHANGING.keys() | _RUNTIME.keys()
    unread = sorted(key for key in settings.keys() - known if settings[key] is not None)
    notes = [
        f"{what} ({key}) is the tool's own at run time and is left out"
        for key, what in _RUNTIME.items()
        if settings.get(key) and what
    ]
    if unread:
        notes.append(f"settings that graft does not know were not read: {listed(unread)}")
    return notes


_RUNTIME = {
    "static_kv_dtype": "rounding cached keys and values",
    "static_kv_granularity": "",
    "static_attention_dtype": "rounding attention",
    "static_attention_granularity": "",
}
_CHANGING = {
    "is_marlin_format": "the tensors are in Marlin's order",
    "adapter": "an adapter is added to the weights",
    "rotation": "the weights are rotated",
    "rotation_config": "the weights are rotated",
    "spinquant_config": "the weights are rotated",
    "super_bits": "scales are quantised",
    "super_group_size": "scales are quantised",
}


def _problems(settings: dict[str, Any], where: str) -> list[str]:
    """Return what says that a weight is more than its codes, zero points and scales."""
    advice = "graft does not read that; start from the unquantised model"
    problems = [
        f"{where}{key} is {quoted(settings[key])}: {what}; {advice}"
        for key, what in _CHANGING.items()
        if settings.get(key)
    ]
    kind, bits = settings.get("data_type"), settings.get("bits")
    plain = type(bits) is int and bits >= 16  # such a layer is not quantised
    if kind is not None and not plain and not str(kind).startswith("int"):
        problems.append(f"{where}data_type is {quoted(kind)}; graft reads integers here: {advice}")
    words = settings.get("pack_dtype")
    if words is not None and str(words).removeprefix("torch.") != "int32":
        problems.append(f"{where}pack_dtype is {quoted(words)}; graft reads int32: {advice}")
    inputs = settings.get("act_bits")
    if inputs is not None and not (isinstance(inputs, int) and inputs >= 16):
        problems.append(f"{where}act_bits is {quoted(inputs)}: inputs are rounded too; {advice}")
    return problems
