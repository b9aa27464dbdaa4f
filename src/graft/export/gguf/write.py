"""Writing a merged model as one GGUF file, for llama.cpp and its relatives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from graft.errors import GraftError, raise_problems
from graft.export.gguf.metadata import (
    add_model_metadata,
    gguf_config_notes,
    gguf_config_problems,
)
from graft.export.gguf.tensors import TensorPlan, Unquantised, format_problems, plan_tensors
from graft.export.gguf.tokenizer import GgufTokenizer, add_tokenizer_metadata, convert_tokenizer
from graft.files.write import replacing
from graft.formats.base import WeightFormat
from graft.model.gguf.layout import gguf_layout

OnTensor = Callable[[int, int, str], None]
"""Called after each tensor with (tensors written, all tensors, name)."""

_FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
}


@dataclass(frozen=True)
class GgufReport:
    """What was written."""

    path: Path
    bytes: int
    """Size of the file."""
    tensors: dict[str, int]
    """Number of tensors of each GGUF type."""
    float32_layers: tuple[str, ...]
    """Layers in the int format whose rows are no multiple of 32: their exact weights are in F32."""
    dense_layers: tuple[str, ...]
    """Layers in a format that GGUF has not, written unquantised (`dense=True`)."""
    max_rounding: float
    """Largest |written - trained| over all weights; 0.0: every weight is the trained one."""
    notes: tuple[str, ...]
    """What llama.cpp does a little differently, or with rare texts, if anything."""


def check_gguf_plan(config: PretrainedConfig, weight_format: WeightFormat) -> list[str]:
    """Return every reason why a model in that format cannot be exported, before it exists."""
    return gguf_config_problems(config) + format_problems(weight_format)


def check_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, dense: bool = False
) -> list[str]:
    """Return every reason why this model and tokenizer cannot be exported; reads no weights."""
    problems = gguf_config_problems(model.config)
    if problems:
        return problems
    problems = plan_tensors(model, "F32", dense).problems
    try:
        convert_tokenizer(tokenizer, model.config)
    except GraftError as error:
        problems.append(str(error))
    return problems


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    unquantised: Unquantised,
    name: str,
    dense: bool = False,
    on_tensor: OnTensor | None = None,
) -> GgufReport:
    """Write model, tokenizer and chat template as one GGUF file.

    Layers in the int format (2, 3 or 4 bits, groups of a multiple of 32) become Q4_1 with the very
    same weights, w = d * q + m; all else is written as `unquantised`, norms and biases in F32.
    `dense` writes layers in other quantised formats unquantised too, instead of refusing. One
    tensor is in memory at a time; the file appears under its name only when it is complete.

    Raises GraftError, with every reason, before anything is written.
    """
    raise_problems(check_gguf(model, tokenizer, dense=dense), "cannot export to GGUF")
    plan = plan_tensors(model, unquantised, dense)
    vocabulary = convert_tokenizer(tokenizer, model.config)
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf_layout(model.config).architecture)
        try:
            max_rounding = _write(
                writer, plan, vocabulary, model.config, unquantised, name, on_tensor
            )
        finally:
            writer.close()
    return GgufReport(
        path=path,
        bytes=path.stat().st_size,
        tensors=dict(Counter(tensor.type.name for tensor in plan.tensors)),
        float32_layers=tuple(plan.float32_layers),
        dense_layers=tuple(plan.dense_layers),
        max_rounding=max_rounding,
        notes=gguf_config_notes(model.config) + vocabulary.notes,
    )


def _write(
    writer: gguf.GGUFWriter,
    plan: TensorPlan,
    vocabulary: GgufTokenizer,
    config: PretrainedConfig,
    unquantised: Unquantised,
    name: str,
    on_tensor: OnTensor | None,
) -> float:
    add_model_metadata(writer, config, vocabulary.named(name))
    quantised = any(tensor.type is gguf.GGMLQuantizationType.Q4_1 for tensor in plan.tensors)
    file_type = gguf.LlamaFileType.MOSTLY_Q4_1 if quantised else _FILE_TYPES[unquantised]
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer_metadata(writer, vocabulary)
    for tensor in plan.tensors:
        writer.add_tensor_info(
            tensor.name, tensor.byte_shape, np.dtype(np.uint8), tensor.bytes, raw_dtype=tensor.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    max_rounding = 0.0
    for done, tensor in enumerate(plan.tensors, start=1):
        data, rounding = tensor.make()
        writer.write_tensor_data(data.numpy())
        max_rounding = max(max_rounding, rounding)
        if on_tensor is not None:
            on_tensor(done, len(plan.tensors), tensor.name)
    return max_rounding
