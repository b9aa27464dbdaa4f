"""Tiny models as auto-round, HQQ, compressed-tensors and torchao write them, and their logits."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _foreign_models import (
    DEQUANTISE,
    UNROUNDED,
    Case,
    Tool,
    base_model,
    loaded,
    logits_of,
    write_tokenizer,
)
from torch import Tensor

IN_MEMORY = "its own rounded model in memory, in float32"


# auto-round ---------------------------------------------------------------------------------------


def by_auto_round(folder: Path, layout: str, **options: Any) -> Tensor:
    """Round to nearest in float32, write that, and do the same once more in memory."""
    base_model(folder / "base")
    _rounder(folder, **options).quantize_and_save(str(folder / "written"), format=layout)
    (inside,) = (folder / "written").iterdir()
    shutil.move(inside, folder / "theirs")
    model, _ = _rounder(folder, **options).quantize()
    return logits_of(model.float())


def _rounder(folder: Path, **options: Any) -> Any:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = loaded(folder / "base")
    return AutoRound(model, tokenizer, iters=0, disable_opt_rtn=True, amp=False, **options)


_LAYOUTS = (
    ("auto_round", {"bits": 4, "group_size": 32}),
    ("auto_round", {"bits": 4, "group_size": 32, "sym": False}),
    ("auto_round", {"bits": 2, "group_size": 32}),
    ("auto_round", {"bits": 3, "group_size": 32}),
    ("auto_round", {"bits": 8, "group_size": 32}),
    ("auto_gptq", {"bits": 4, "group_size": 32}),
    ("auto_gptq", {"bits": 4, "group_size": 32, "sym": False}),
    ("auto_gptq", {"bits": 8, "group_size": -1}),
    ("auto_awq", {"bits": 4, "group_size": 32}),
    ("auto_awq", {"bits": 4, "group_size": 32, "sym": False}),
)


def _said(options: dict[str, Any]) -> str:
    kind = "asymmetric" if options.get("sym") is False else "symmetric"
    return f"{options['bits']} bits, groups of {options['group_size']}, {kind}"


AUTO_ROUND = Tool(
    ("auto-round",),
    [
        Case(
            f"{layout}, {_said(options)}",
            partial(by_auto_round, layout=layout, **options),
            bound=1e-2,
            compared=IN_MEMORY,
        )
        for layout, options in _LAYOUTS
    ],
)


# HQQ ----------------------------------------------------------------------------------------------


def by_hqq(folder: Path, **options: Any) -> Tensor:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    base_model(folder / "base")
    model = loaded(folder / "base")
    AutoHQQHFModel.quantize_model(
        model,
        quant_config=BaseQuantizeConfig(**options),
        compute_dtype=torch.float32,
        device="cpu",
    )
    AutoHQQHFModel.save_quantized(model, str(folder / "theirs"))
    write_tokenizer(folder / "theirs")
    return logits_of(model)


HQQ = Tool(
    ("hqq",),
    [
        *(
            Case(
                f"{bits} bits, groups of 64", partial(by_hqq, nbits=bits, group_size=64), bound=1e-2
            )
            for bits in (8, 4, 3, 2)
        ),
        Case("1 bit, groups of 32", partial(by_hqq, nbits=1, group_size=32), DEQUANTISE),
        Case(
            "4 bits, groups along the other axis",
            partial(by_hqq, nbits=4, group_size=64, axis=0),
            DEQUANTISE,
        ),
    ],
)


# compressed-tensors -------------------------------------------------------------------------------


def by_compressed_tensors(folder: Path, **weights: Any) -> Tensor:
    """Round to nearest with its own schemes, compressors and function of what they stand for."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    base_model(folder / "base")
    model, dense = loaded(folder / "base"), loaded(folder / "base")
    arguments = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for name, module in model.named_modules():
        if not hasattr(module, "weight_scale"):
            continue
        weight = module.weight.data
        size = arguments.group_size or weight.shape[1]
        parts = weight.unflatten(-1, (-1, size))
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), arguments)
        if arguments.strategy == "tensor":
            scale, zero = calculate_qparams(weight.min()[None], weight.max()[None], arguments)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        zeros = getattr(module, "weight_zero_point", None)
        if zeros is not None:
            zeros.data.copy_(zero.reshape(zeros.shape))
        stands_for = fake_quantize(weight, module.weight_scale, zeros, arguments)
        dense.get_submodule(name).weight.data.copy_(stands_for)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder / "theirs")
    compressor.update_config(str(folder / "theirs"))
    write_tokenizer(folder / "theirs")
    return logits_of(dense)


_GROUPS = {"strategy": "group", "group_size": 32}
_FP8 = {"num_bits": 8, "type": "float"}
COMPRESSED = Tool(
    ("compressed-tensors",),
    [
        Case(
            "W4A16, groups of 32",
            partial(by_compressed_tensors, num_bits=4, symmetric=True, **_GROUPS),
            bound=1e-2,
        ),
        Case(
            "W4A16, groups of 32, asymmetric",
            partial(by_compressed_tensors, num_bits=4, symmetric=False, **_GROUPS),
            bound=1e-2,
        ),
        Case(
            "W4A16, rows",
            partial(by_compressed_tensors, num_bits=4, symmetric=True, strategy="channel"),
            bound=1e-2,
        ),
        Case(
            "W8A16, rows",
            partial(by_compressed_tensors, num_bits=8, symmetric=True, strategy="channel"),
            bound=1e-2,
        ),
        Case(
            "FP8, rows",
            partial(by_compressed_tensors, strategy="channel", **_FP8),
            DEQUANTISE,
            compared=UNROUNDED,
        ),
        Case(
            "FP8, one scale",
            partial(by_compressed_tensors, strategy="tensor", **_FP8),
            DEQUANTISE,
            compared=UNROUNDED,
        ),
    ],
)


# torchao ------------------------------------------------------------------------------------------


def by_torchao(folder: Path, name: str, group_size: int | None = None) -> Tensor:
    import torchao.quantization as quantization
    from transformers import TorchAoConfig

    base_model(folder / "base")
    options = {} if group_size is None else {"granularity": quantization.PerGroup(group_size)}
    chosen = TorchAoConfig(getattr(quantization, name)(**options))
    model = loaded(folder / "base", quantization_config=chosen)
    model.save_pretrained(folder / "theirs")
    write_tokenizer(folder / "theirs")
    return logits_of(model)


TORCHAO = Tool(
    ("torchao",),
    [
        Case("Int8WeightOnlyConfig", partial(by_torchao, name="Int8WeightOnlyConfig"), bound=1e-2),
        Case(
            "Int8WeightOnlyConfig, groups of 32",
            partial(by_torchao, name="Int8WeightOnlyConfig", group_size=32),
            bound=1e-2,
        ),
        Case(
            "Float8WeightOnlyConfig",
            partial(by_torchao, name="Float8WeightOnlyConfig"),
            DEQUANTISE,
        ),
    ],
)
