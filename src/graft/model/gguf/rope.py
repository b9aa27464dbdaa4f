"""The rotary settings of a GGUF file, as Transformers spells them.

llama.cpp divides each frequency by a factor of its own (the tensor rope_freqs.weight), multiplies
all of them by 1 / rope.scaling.factor, or mixes the two as YaRN does.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from graft.errors import GraftError
from graft.model.gguf.file import GgufFile
from graft.model.gguf.layout import ROPE_PARAMETERS_KEY, gguf_layout, head_dim, rope_factors
from graft.text import quoted
from graft.understood import understood

ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What the models that Meta has published share; their factors differ."""
_CLOSE = 1e-5
"""How far, relatively, frequencies may lie apart that float32 rounds in another order."""


def read_rope(file: GgufFile, config: PretrainedConfig) -> dict[str, Any]:
    """Return the rotary settings; raises GraftError for those that Transformers has not.

    graft's own files say in JSON which settings made their factors; that is believed where it makes
    the same frequencies.
    """
    found = _from_keys(file, config)
    if ROPE_PARAMETERS_KEY not in file.metadata:
        return found
    words = f"has metadata {ROPE_PARAMETERS_KEY} that are not understood"
    with understood(file.path, words):
        stated = dict(json.loads(file.value(ROPE_PARAMETERS_KEY, str)))
        ours, theirs = _frequencies(stated, config), _frequencies(found, config)
    if not torch.allclose(ours, theirs, rtol=_CLOSE, atol=0.0):
        raise GraftError(
            f"{file.path}: {ROPE_FACTORS} does not follow from {ROPE_PARAMETERS_KEY}, nor do the "
            "rotary metadata; export the file again"
        )
    return stated


def _frequencies(rope: dict[str, Any], config: PretrainedConfig) -> Tensor:
    """Return the frequencies, and the factor of the attention behind them."""
    if rope["rope_type"] == "default":
        width = head_dim(config)
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return torch.cat([1.0 / rope["rope_theta"] ** exponents, torch.ones(1)])
    config.rope_parameters = rope
    made, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return torch.cat([made.float(), torch.tensor([float(scale)])])


def _from_keys(file: GgufFile, config: PretrainedConfig) -> dict[str, Any]:
    keys = _Keys(file)
    theta, kind, factor = keys.number("freq_base", 10000.0), keys.kind(), keys.factor()
    keys.check_rest(kind)
    scaled = kind != "none" and (factor, keys.number("scaling.attn_factor", 1.0)) != (1.0, 1.0)
    factors = file.tensors.get(ROPE_FACTORS) if gguf_layout(config).paired_rotary else None
    if factors is not None:
        if scaled:
            raise GraftError(
                f"{file.path}: has both {ROPE_FACTORS} and a rope scaling of {factor:g}, which no "
                "settings of Transformers stand for"
            )
        return _from_factors(file, factors.dense().float(), config, theta)
    if not scaled:
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return keys.yarn(theta, factor)


class _Keys:
    """The metadata of rotary scaling, with llama.cpp's defaults."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.prefix = file, f"{file.architecture}.rope."

    def number(self, name: str, default: float) -> float:
        return self.file.number(self.prefix + name, default)

    def kind(self) -> str:
        kind: str = self.file.value(f"{self.prefix}scaling.type", str, "linear")
        if kind not in ("none", "linear", "yarn"):
            raise GraftError(
                f"{self.file.path}: rope scaling is {quoted(kind)}; graft reads none, linear, yarn "
                "and llama3"
            )
        return kind

    def factor(self) -> float:
        """Return the factor of the positions, which older files have under another name."""
        factor = self.number("scaling.factor", self.number("scale_linear", 0.0))
        if factor < 0:
            raise GraftError(f"{self.file.path}: the factor of rope scaling is {factor:g}")
        return factor or 1.0

    def check_rest(self, kind: str) -> None:
        """Raise GraftError where more is scaled than the kind of scaling does by itself."""
        yarn = kind == "yarn"
        usual: dict[str, tuple[float, ...]] = {
            "yarn_attn_factor": (1.0,),
            "yarn_ext_factor": (-1.0, 1.0) if yarn else (-1.0, 0.0),
        }
        if yarn:  # llama.cpp's own programs read these two, its Python binding does not
            usual |= {"yarn_beta_fast": (-1.0, 32.0), "yarn_beta_slow": (-1.0, 1.0)}
        else:
            usual["attn_factor"] = (1.0,)
        for name, taken in usual.items():
            key = f"scaling.{name}"
            if (found := self.number(key, taken[0])) not in taken:
                raise GraftError(
                    f"{self.file.path}: metadata {self.prefix}{key} is {found:g}; graft computes "
                    f"only what {' or '.join(f'{one:g}' for one in taken)} stands for"
                )

    def yarn(self, theta: float, factor: float) -> dict[str, Any]:
        trained = self.file.value(f"{self.file.architecture}.context_length", int)
        original = self.file.value(f"{self.prefix}scaling.original_context_length", int, trained)
        rope = {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
        }
        # It multiplies what YaRN makes of the factor by itself.
        if (more := self.number("scaling.attn_factor", 1.0)) != 1.0:
            rope["attention_factor"] = more * (0.1 * math.log(max(factor, 1.0)) + 1.0)
        return rope


def _from_factors(
    file: GgufFile, factors: Tensor, config: PretrainedConfig, theta: float
) -> dict[str, Any]:
    """Return Llama 3's settings, where they are what makes the file's factors.

    llama.cpp's converter keeps the factors alone. Any others are held by LongRoPE's settings, which
    list them one by one.
    """
    if factors.shape != (head_dim(config) // 2,) or not bool((factors > 0).all()):
        raise GraftError(
            f"{file.path}: {ROPE_FACTORS} is {list(factors.shape)}; expected "
            f"{head_dim(config) // 2} positive numbers"
        )
    llama3 = _LLAMA3 | {"rope_theta": theta, "factor": float(factors.max())}
    config.rope_parameters = llama3
    made = rope_factors(config)
    if made is not None and torch.allclose(made, factors, rtol=_CLOSE, atol=0.0):
        return llama3
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "attention_factor": 1.0,
        "factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }
