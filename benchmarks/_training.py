"""Models with random weights that train: graft's, and PEFT's on bitsandbytes or dense weights.

Both keep norms, embeddings and head in the dtype that they compute in, adapt all seven linear
layers of a decoder layer, and begin with equal shapes packed once and copied, instead of read from
a file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from _peers import bitsandbytes, bitsandbytes_copy, bitsandbytes_quantise
from _shapes import ALPHA, GROUP_SIZE, RANK, LlamaShape
from _timing import Laps
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from graft.adapters.attach import adapter_parameters, attach_adapter, replace_module
from graft.adapters.config import AdapterConfig
from graft.data.encode import Example
from graft.formats.registry import make_format
from graft.layers.narrow import NARROW, NARROW_CLASSES, narrow
from graft.layers.registry import kind_of
from graft.model.running.attention import use_own_attention
from graft.model.running.checkpointing import Checkpointing, enable_checkpointing
from graft.model.running.memory import reuse_freed_memory
from graft.model.running.pointwise import use_own_pointwise
from graft.model.running.rotary import use_own_rotary
from graft.model.subject import build_skeleton
from graft.model.targets import select_targets
from graft.objectives.base import LossResult
from graft.objectives.next_token import NEXT_TOKEN
from graft.optimizers.adamw import ADAMW
from graft.train.config import LoopConfig
from graft.train.loop import train
from graft.train.metrics import Metrics
from graft.train.task import TrainingTask

Train = Callable[[int, Laps], float]
"""Takes that many training steps, each a lap; returns the last loss per token."""

BitsandbytesPacked = tuple[Tensor, Any]

_LEARNING_RATE = 1e-4
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("dense", {"dtype": "bfloat16"}),
    "qlora": ("nf4", {"double_quant": True}),
    "qalora": ("int", {"bits": 4, "group_size": GROUP_SIZE}),
    "qalora-offsets": ("int", {"bits": 4, "group_size": GROUP_SIZE}),
    "qalora-2": ("int", {"bits": 2, "group_size": GROUP_SIZE}),
    "qalora-8": ("int", {"bits": 8, "group_size": GROUP_SIZE}),
    "affine": ("int", {"bits": 4, "group_size": GROUP_SIZE}),
    "merge_aware": ("latent", {"bits": 4, "group_size": GROUP_SIZE}),
    "merge_aware-int8": ("latent", {"bits": 4, "group_size": GROUP_SIZE, "dtype": "int8"}),
}


# graft --------------------------------------------------------------------------------------------


def graft_training(
    shape: LlamaShape,
    method: str,
    checkpointing: str,
    ids: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    cuda_graphs: bool = False,
) -> Train:
    """Build a model as `graft.finetune` does; the result trains it by graft's own loop."""
    model = graft_model(shape, method, dtype)
    reuse_freed_memory(sparing=checkpointing == "layers")
    use_own_attention(model)
    enable_checkpointing(model, cast(Checkpointing, checkpointing))
    name, _, variant = method.partition("-")
    config = AdapterConfig(
        method=name,
        rank=RANK,
        alpha=ALPHA,
        grid_rank=0 if variant == "offsets" else None,
    )
    attach_adapter(model, select_targets(model, ()), config.resolved(4))
    use_own_pointwise(model)
    use_own_rotary(model)
    parameters = adapter_parameters(model, "default")
    predicted = [False] + [True] * (ids.shape[1] - 1)
    examples = [Example(row, predicted, "random") for row in ids.tolist()]

    def run(steps: int, laps: Laps) -> float:
        def on_metrics(metrics: Metrics) -> None:
            if "step_seconds" in metrics:
                laps.lap()
            else:  # of the evaluation before the first step, or after the last
                laps.start()

        with tempfile.TemporaryDirectory() as folder:
            task = TrainingTask(
                model=model,
                parameters=parameters,
                examples=examples,
                objective=NEXT_TOKEN,
                evaluate=lambda: LossResult(0.0, 1),
                optimizer=ADAMW,
                learning_rate=_LEARNING_RATE,
                steps=steps,
                folder=Path(folder),
            )
            loop = LoopConfig(out=folder, batch_size=len(examples), cuda_graphs=cuda_graphs)
            return train(task, loop, on_metrics).last["loss"]

    return run


def graft_model(
    shape: LlamaShape, method: str, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """Return a model with random frozen layers that computes in dtype, as `load_model` makes it."""
    model = build_skeleton(shape.config())
    name, options = _FORMATS[method]
    weight_format = make_format(name, options)
    packed: dict[tuple[int, int], dict[str, Tensor]] = {}
    for layer in select_targets(model, ()):
        module = model.get_submodule(layer)
        assert isinstance(module, nn.Linear)
        size = (module.out_features, module.in_features)
        if size not in packed:
            packed[size] = weight_format.pack(_random(size))
        own = {key: tensor.clone() for key, tensor in packed[size].items()}
        replace_module(model, layer, kind_of(module).frozen(module, weight_format, own, None))
    if dtype == torch.float32:  # of a folder in bf16
        narrow(model.get_input_embeddings())
        narrow(model.get_output_embeddings())
    _fill(model, dtype)
    model.requires_grad_(False)
    return model


# PEFT ---------------------------------------------------------------------------------------------


def peft_training(
    shape: LlamaShape,
    method: str,
    checkpointing: str,
    ids: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Train:
    """Build PEFT's LoRA on bitsandbytes' NF4, or on bf16 weights; the result trains it.

    In bf16, norms, embeddings and head keep it: PEFT's `prepare_model_for_kbit_training` would
    raise them to fp32, which costs time and memory. There is no clipping of gradients, which graft
    has.
    """
    import peft

    with torch.device("meta"):
        base = LlamaForCausalLM(shape.config())
    make = _bitsandbytes_layer if method == "qlora" else _dense_layer
    packed: dict[tuple[int, int], BitsandbytesPacked] = {}
    for name, module in list(base.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Linear) and child != "lm_head":
            setattr(base.get_submodule(parent), child, make(module, packed, dtype))
    packed.clear()
    _fill(base, dtype)
    if method == "qlora":  # marks by which PEFT knows bitsandbytes' layers
        marks: dict[str, Any] = {"is_loaded_in_4bit": True, "is_quantized": True}
        base.__dict__.update(marks)
        base.config.quantization_config = {"quant_method": "bitsandbytes"}
    base.requires_grad_(False)
    if checkpointing == "layers":
        base.enable_input_require_grads()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = list(shape.linears())
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM", bias="none"
    )
    model = peft.get_peft_model(base, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE)

    def run(steps: int, laps: Laps) -> float:
        laps.start()
        for _ in range(steps):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            last = loss.item()
            laps.lap()
        return last

    return run


def _dense_layer(
    module: nn.Linear, packed: dict[tuple[int, int], BitsandbytesPacked], dtype: torch.dtype
) -> nn.Module:
    size = (module.out_features, module.in_features)
    module.weight = nn.Parameter(_random(size, dtype), requires_grad=False)
    return module


def _bitsandbytes_layer(
    module: nn.Linear, packed: dict[tuple[int, int], BitsandbytesPacked], dtype: torch.dtype
) -> nn.Module:
    """Return a Linear4bit of the module's shape, on a copy of the packed weight of that shape."""
    bnb = bitsandbytes()
    size = (module.out_features, module.in_features)
    if size not in packed:
        packed[size] = bitsandbytes_quantise(_random(size, dtype))
    codes, state = bitsandbytes_copy(packed[size])
    layer: nn.Module = bnb.nn.Linear4bit(
        module.in_features,
        module.out_features,
        bias=False,
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        quant_type="nf4",
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = state
    return layer


# Both ---------------------------------------------------------------------------------------------


def _fill(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give what is still on the meta device random data, or in norms ones."""
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, child = name.rpartition(".")
            module = model.get_submodule(parent)
            own = NARROW if isinstance(module, NARROW_CLASSES) else dtype
            fresh = nn.Parameter(_random(tuple(parameter.shape), own), requires_grad=False)
            setattr(module, child, fresh)
    assert isinstance(model.config, LlamaConfig)
    model.config.dtype = dtype
    model.get_decoder().rotary_emb = LlamaRotaryEmbedding(model.config)


def _random(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return ones for a norm's vector, else a uniform matrix of standard deviation 0.02."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    bound = 0.02 * 3**0.5
    return torch.empty(shape, dtype=dtype).uniform_(-bound, bound)
