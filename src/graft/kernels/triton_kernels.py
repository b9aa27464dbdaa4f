"""The Triton kernels by name, by family; `graft.kernels.backend.triton_launch` looks here."""

from graft.kernels.frozen.codebook_triton_kernels import (
    codebook_dequantize,
    codebook_linear,
    codebook_quantize,
    codebook_vector,
)
from graft.kernels.frozen.int8_triton_kernels import int8_dequantize, int8_linear
from graft.kernels.frozen.int_group_triton_kernels import (
    int_group_dequantize,
    int_group_grad_statistics,
    int_group_linear,
    int_group_vector,
)
from graft.kernels.latent.triton_kernels import latent_codes, latent_grads
from graft.kernels.moves.triton_kernels import move_by_factors, move_offsets, move_scaled
from graft.kernels.pointwise.triton_kernels import (
    cross_entropy,
    rms_norm,
    rms_norm_backward,
    rotary,
    silu_gate,
    silu_gate_backward,
)

__all__ = [
    "codebook_dequantize",
    "codebook_linear",
    "codebook_quantize",
    "codebook_vector",
    "cross_entropy",
    "int8_dequantize",
    "int8_linear",
    "int_group_dequantize",
    "int_group_grad_statistics",
    "int_group_linear",
    "int_group_vector",
    "latent_codes",
    "latent_grads",
    "move_by_factors",
    "move_offsets",
    "move_scaled",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "silu_gate",
    "silu_gate_backward",
]
