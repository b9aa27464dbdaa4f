"""GGUF files as llama.cpp's converter and quantiser write them, and the models they stand for."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied llama": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LINEAR),
    "llama 3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gemma": GemmaConfig(**SIZES, head_dim=16, hidden_activation="gelu_pytorch_tanh"),
}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
}


def rotated(rows, heads: int):
    """What llama.cpp's converter does to the query and key projections of a Llama."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(rope):
    """What llama.cpp's converter makes of Llama 3's settings, for heads of 16."""
    factors = []
    for place in range(0, 16, 2):
        turns = rope["original_max_position_embeddings"] / (
            2 * np.pi * rope["rope_theta"] ** (place / 16)
        )
        smooth = (turns - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


class Written:
    """A GGUF file and the model whose weights it stands for."""

    def __init__(
        self, path, config, linear=Kind.Q4_0, other=Kind.F32, change=None, kinds=lambda name: None
    ):
        torch.manual_seed(0)
        self.path, self.config = path, config
        self.model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in self.model.parameters():  # norms of 1 would hide mistakes
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter.data, 1.0, 0.2)
        name = config.model_type
        self.writer = gguf.GGUFWriter(path, name)
        names = gguf.get_tensor_name_map(ARCHITECTURES[name], 2)
        tensors = {}
        for key, parameter in self.model.state_dict().items():
            if key == "lm_head.weight" and config.tie_word_embeddings:
                continue
            module = key.rpartition(".")[0]
            target = f"{names.get_name(module)}.{key.rpartition('.')[2]}"
            quantised = parameter.dim() == 2
            kind = Kind.F32
            if quantised:
                kind = kinds(target) or (linear if module.endswith("_proj") else other)
            tensors[target] = self.block(key, parameter, kind)
        if config.rope_parameters["rope_type"] == "llama3":
            tensors["rope_freqs.weight"] = (llama3_factors(config.rope_parameters), Kind.F32)
        if change is not None:
            change(self.writer, tensors)
        self.metadata(name)
        finish(self.writer, tensors)

    def block(self, key, parameter, kind):
        """Return the data as the file has it; the model gets what they mean, float64 loops."""
        values = parameter.detach().numpy()
        heads = None
        if self.config.model_type == "llama":
            heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
        stored = values if heads is None else rotated(values, heads)
        if self.config.model_type == "gemma" and key.split(".")[-2].endswith("norm"):
            stored = stored + 1
        if kind is Kind.F32:
            return stored.astype(np.float32), kind
        data = SCALES[kind](stored.shape) if kind in SCALES else gguf.quants.quantize(stored, kind)
        if kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0):
            meant = np.array([blocks_of(row, kind) for row in data.view(np.uint8)])
        else:
            meant = READ[kind](data) if kind in READ else gguf.quants.dequantize(data, kind)
        if heads is not None:
            back = np.argsort(rotated(np.arange(len(meant)), heads))
            meant = meant[back]
        parameter.data.copy_(torch.from_numpy(meant))
        return data, kind

    def metadata(self, name):
        writer, config = self.writer, self.config
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        if name in ("qwen3", "gemma"):
            writer.add_key_length(config.head_dim)
        if config.rope_parameters["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
        writer.add_uint32("tokenizer.ggml.eos_token_id", 0)


def random_blocks(kind, scales, at=0):
    """Return a function from a shape to random blocks, whose scales in fp16 stand at a byte."""

    def make(shape):
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = np.random.default_rng(7).integers(
            0, 256, (shape[0], shape[1] // weights, size), dtype=np.uint8
        )
        stored = np.frombuffer(np.array(scales, np.float16).tobytes(), np.uint8)
        blocks[..., range(at, at + len(stored))] = stored
        return blocks.reshape(shape[0], -1)

    return make


def mxfp4_blocks(shape):
    blocks = random_blocks(Kind.MXFP4, (1.0,))(shape)
    blocks[:, ::17] = 120 + blocks[:, 1::17] % 4  # exponents
    return blocks


SCALES = {
    Kind.Q2_K: random_blocks(Kind.Q2_K, (0.01, 0.02), -4),
    Kind.Q3_K: random_blocks(Kind.Q3_K, (0.002,), -2),
    Kind.Q4_K: random_blocks(Kind.Q4_K, (0.0005, 0.002)),
    Kind.Q5_K: random_blocks(Kind.Q5_K, (0.0003, 0.002)),
    Kind.Q6_K: random_blocks(Kind.Q6_K, (0.0001,), -2),
    Kind.IQ2_XXS: random_blocks(Kind.IQ2_XXS, (0.002,)),
    Kind.IQ3_S: random_blocks(Kind.IQ3_S, (0.002,)),
    Kind.IQ4_NL: random_blocks(Kind.IQ4_NL, (0.002,)),
    Kind.IQ4_XS: random_blocks(Kind.IQ4_XS, (0.0001,)),
    Kind.TQ1_0: random_blocks(Kind.TQ1_0, (0.1,), -2),
    Kind.TQ2_0: random_blocks(Kind.TQ2_0, (0.1,), -2),
    Kind.Q1_0: random_blocks(Kind.Q1_0, (0.1,)),
    Kind.MXFP4: mxfp4_blocks,
}
"""Random blocks of the types that gguf does not write, or not in small numbers."""


def halves(blocks, begin, end=None):
    return blocks[:, begin:end].copy().view(np.float16).astype(np.float32).T[..., None]


def q4_k(blocks):
    """Eight groups of 32 with scales and minima of 6 bits, in units of two halves."""
    (d, least), packed, values = halves(blocks, 0, 4), blocks[:, 4:16], []
    for group in range(8):
        if group < 4:
            scale, low = packed[:, group] & 63, packed[:, group + 4] & 63
        else:
            scale = packed[:, group + 4] & 15 | packed[:, group - 4] >> 6 << 4
            low = packed[:, group + 4] >> 4 | packed[:, group] >> 6 << 4
        pairs = blocks[:, 16 + group // 2 * 32 :][:, :32]
        codes = pairs >> 4 if group % 2 else pairs & 15
        values.append(d * scale[:, None] * codes - least * low[:, None])
    return np.concatenate(values, 1)


def q6_k(blocks):
    """Sixteen groups of 16 with scales of 8 bits; codes of 6 bits, less 32."""
    (d,), scales = halves(blocks, 208), blocks[:, 192:208].copy().view(np.int8)
    values = []
    for place in range(256):
        half, rest = divmod(place, 128)
        quarter, column = divmod(rest, 32)
        nibble = blocks[:, half * 64 + quarter % 2 * 32 + column] >> 4 * (quarter // 2) & 15
        two = blocks[:, 128 + half * 32 + column] >> 2 * quarter & 3
        codes = (nibble | two << 4).astype(np.float32) - 32
        values.append(d[:, 0] * scales[:, place // 16] * codes)
    return np.stack(values, 1)


def tq2_0(blocks):
    quarters = [blocks[:, half : half + 32] >> 2 * n & 3 for half in (0, 32) for n in range(4)]
    return halves(blocks, 64)[0] * (np.concatenate(quarters, 1).astype(np.float32) - 1)


def q1_0(blocks):
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32)
    return halves(blocks, 0, 2)[0] * (2 * bits - 1)


def by_rows(kind, read):
    size = gguf.GGML_QUANT_SIZES[kind][1]
    return lambda data: read(data.reshape(-1, size)).reshape(data.shape[0], -1)


READ = {
    kind: by_rows(kind, read)
    for kind, read in (
        (Kind.Q4_K, q4_k),
        (Kind.Q6_K, q6_k),
        (Kind.TQ2_0, tq2_0),
        (Kind.Q1_0, q1_0),
    )
}
"""What blocks mean, by ggml's description; gguf says it of the others."""


def blocks_of(row, kind) -> list[float]:
    """Return a row of blocks as numbers, from ggml's description of the block."""
    size = {Kind.Q4_0: 18, Kind.Q4_1: 20, Kind.Q8_0: 34}[kind]
    values = []
    for start in range(0, len(row), size):
        block = row[start : start + size]
        d = float(block[:2].view(np.float16)[0])
        if kind is Kind.Q8_0:
            values += [d * int(code) for code in block[2:].view(np.int8)]
            continue
        low = float(block[2:4].view(np.float16)[0]) if kind is Kind.Q4_1 else -8 * d
        nibbles = [int(byte) for byte in block[size - 16 :]]
        values += [d * (byte & 15) + low for byte in nibbles]
        values += [d * (byte >> 4) + low for byte in nibbles]
    return values


def finish(writer, tensors) -> None:
    """Write tensors, (data, kind) by name, and close the file."""
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=None if data.dtype == np.float32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rewritten(source, target, *, add=(), drop=(), keep=lambda name: True, bare=False):
    """Copy a file with other metadata, (key, value, type), or a part of its tensors."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    dropped = {"general.architecture", *drop, *(key for key, *_ in add)}
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in dropped or bare:
            continue
        kind = field.types[0]
        if kind is Value.ARRAY:
            writer.add_key_value(key, field.contents(), kind, sub_type=field.types[-1])
        else:
            writer.add_key_value(key, field.contents(), kind)
    for key, value, *kinds in add:
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif kinds[0] is Value.ARRAY:
            writer.add_key_value(key, value, kinds[0], sub_type=kinds[1])
        else:
            writer.add_key_value(key, value, kinds[0])
    kept = [tensor for tensor in reader.tensors if keep(tensor.name)]
    finish(writer, {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in kept})
    return target


def parts_of(source, stem, count, place):
    """Cut a file as llama-gguf-split does; `place` says for a tensor's name which part holds it."""
    total = len(gguf.GGUFReader(source).tensors)
    files = []
    for number in range(count):
        add = [
            ("split.no", number, Value.UINT16),
            ("split.count", count, Value.UINT16),
            ("split.tensors.count", total, Value.INT32),
        ]
        file = stem.with_name(f"{stem.name}-{number + 1:05}-of-{count:05}.gguf")
        held = {tensor.name for tensor in gguf.GGUFReader(source).tensors}
        held = {name for name in held if place(name) == number}
        files.append(rewritten(source, file, add=add, keep=held.__contains__, bare=number > 0))
    return files
