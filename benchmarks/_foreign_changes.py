"""One change of a foreign folder, drawn from a seeded generator."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from _foreign_owners import Kind
from safetensors import safe_open
from safetensors.torch import save_file

VALUES = [
    None,
    True,
    False,
    0,
    1,
    2,
    3,
    4,
    8,
    32,
    64,
    128,
    1e-5,
    2.0,
    -1,
    "",
    "gptq",
    "default",
    [],
]
FORMATS = ("gptq", "gptq_v2", "gemm", "marlin", "pack-quantized", "int-quantized", "nf4", "fp4")
NAMES = ("lora_A", "lora_B", "bias", "weight", "scales", "q_proj", "k_proj", "model.", "layers.0")


def change(folder: Path, kind: Kind, chance: random.Random) -> str:
    """Change one thing of what `kind` wrote; return what, '' where the draw has no place."""
    files = sorted((folder / kind.changed).rglob("*.safetensors"))
    settings = [
        path
        for path in sorted((folder / kind.changed).rglob("*.json"))
        if path.name in kind.settings
    ]
    gguf = sorted(folder.glob(kind.changed)) if kind.changed.endswith(".gguf") else []
    if gguf:
        return _gguf(gguf[0], chance)
    if settings and (not files or chance.random() < 0.45):
        return _setting(chance.choice(settings), chance)
    if not files:
        return ""
    return _tensors(chance.choice(files), chance)


# Settings -----------------------------------------------------------------------------------------


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = []
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in items:
        found.append((*path, key))
        found += _places(inner, (*path, key))
    return found


def _setting(file: Path, chance: random.Random) -> str:
    content = json.loads(file.read_text(encoding="utf-8"))
    place = chance.choice(_places(content))
    owner = content
    for key in place[:-1]:
        owner = owner[key]
    key, where = place[-1], f"{file.name} {'.'.join(map(str, place))}"
    before, act = owner[key], chance.choice(["change", "change", "change", "drop", "rename"])
    if act == "drop":
        del owner[key]
        said = f"{where}: dropped (was {before!r:.60})"
    elif act == "rename":
        owner[f"{key}_"] = owner.pop(key)
        said = f"{where}: renamed"
    else:
        owner[key] = _other(before, chance)
        said = f"{where}: {before!r:.60} became {owner[key]!r:.60}"
        if owner[key] == before and type(owner[key]) is type(before):
            return ""
    file.write_text(json.dumps(content), encoding="utf-8")
    return said


def _other(value: Any, chance: random.Random) -> Any:
    if chance.random() < 0.2:
        return chance.choice(VALUES)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice([value + 1, value - 1, value * 2, value // 2, -value])
    if isinstance(value, float):
        return chance.choice([value * 2, value / 2, -value, value + 1])
    if isinstance(value, str):
        return chance.choice([value.upper(), value + "x", *FORMATS])
    if isinstance(value, list) and value:
        return chance.choice([value[1:], value[:-1], [*value, value[0]], []])
    if isinstance(value, dict) and value:
        key = chance.choice(list(value))
        return {name: inner for name, inner in value.items() if name != key}
    return chance.choice(VALUES)


# Tensors ------------------------------------------------------------------------------------------


def _tensors(file: Path, chance: random.Random) -> str:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    act = chance.choice(
        ["flip", "swap", "drop", "duplicate", "rename", "sign", "cast", "shape", "extra", "file"]
    )
    names = sorted(tensors)
    name = chance.choice(names)
    tensor = tensors[name]
    said = f"{file.name} {name} {list(tensor.shape)}: {act}"
    if act == "flip":
        flat = tensor.contiguous().view(torch.uint8).flatten().clone()
        if not len(flat):
            return ""
        place = chance.randrange(len(flat))
        flat[place] ^= 1 << chance.randrange(8)
        tensors[name] = flat.view(tensor.dtype).view(tensor.shape)
    elif act == "swap":
        alike = [
            other
            for other in names
            if other != name
            and tensors[other].shape == tensor.shape
            and tensors[other].dtype == tensor.dtype
        ]
        if not alike:
            return ""
        other = chance.choice(alike)
        tensors[name], tensors[other] = tensors[other], tensor
        said += f" with {other}"
    elif act == "drop":
        del tensors[name]
    elif act == "duplicate":
        other = chance.choice(
            [f"model.{name}", name.removeprefix("model."), f"{name}.default", f"base.{name}"]
        )
        tensors[other] = torch.randn(tensor.shape).to(tensor.dtype) if tensor.ndim else tensor
        said += f" as {other}, with other values"
    elif act == "rename":
        old, new = chance.sample(NAMES, 2)
        if old not in name or name.replace(old, new) == name:
            return ""
        tensors[name.replace(old, new)] = tensors.pop(name)
        said += f" to {name.replace(old, new)}"
    elif act == "sign":
        if not tensor.is_signed():
            return ""
        tensors[name] = (
            (-tensor.float()).to(tensor.dtype) if tensor.is_floating_point() else -tensor
        )
    elif act == "cast":
        dtype = chance.choice([torch.float16, torch.bfloat16, torch.float64, torch.int32])
        tensors[name] = tensor.to(torch.float32).to(dtype)
        said += f" to {dtype}"
    elif act == "shape":
        if tensor.ndim != 2:
            return ""
        tensors[name] = chance.choice([tensor.T, tensor[:-1], tensor[:, :-1], tensor.flatten()])
        said += f" to {list(tensors[name].shape)}"
    elif act == "extra":
        other = chance.choice([name.rpartition(".")[0] + ".bias", "lm_head.bias", f"{name}_extra"])
        if other in tensors:
            return ""
        tensors[other] = torch.randn(tensor.shape[:1] or (1,))
        said += f": {other}"
    else:
        copy = file.with_name(
            chance.choice(["model.safetensors", "model-00003-of-00003.safetensors"])
        )
        if copy.exists():
            return ""
        tensors[name] = torch.randn(tensor.shape).to(tensor.dtype) if tensor.ndim else tensor
        file = copy
        said += f": {copy.name} beside it, with that tensor changed"
    whole = {key: value.contiguous().clone() for key, value in tensors.items()}
    save_file(whole, file, metadata=metadata)
    return said


# GGUF ---------------------------------------------------------------------------------------------


def _gguf(file: Path, chance: random.Random) -> str:
    """Write the file again with one key or tensor changed."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(str(file))
    fields = {
        key: field
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and key != "general.architecture"
    }
    plain = [
        key
        for key, field in fields.items()
        if field.types[0] != gguf.GGUFValueType.ARRAY and not key.startswith("general.")
    ]
    tensors = [(one.name, np.array(one.data), one.tensor_type) for one in reader.tensors]
    values = {
        key: (field.contents(), field.types[0], field.types[-1]) for key, field in fields.items()
    }
    act = chance.choice(["key", "key", "drop key", "new key", "drop", "swap", "flip", "rename"])
    index = chance.randrange(len(tensors))
    name, data, kind = tensors[index]
    if act in ("key", "drop key"):
        key = chance.choice(plain)
        value, form, inner = values.pop(key)
        said = f"{key} = {value!r}: {act}"
        if act == "key":
            other = not value if isinstance(value, bool) else _other(value, chance)
            if (
                type(other) is not type(value)
                or other == value
                or (isinstance(other, int) and other < 0)
            ):
                return ""
            values[key] = (other, form, inner)
            said += f" became {other!r}"
    elif act == "new key":
        architecture = reader.fields["general.architecture"].contents()
        key, value, form = chance.choice(
            [
                (f"{architecture}.rope.scale_linear", 2.0, gguf.GGUFValueType.FLOAT32),
                (f"{architecture}.rope.scaling.type", "yarn", gguf.GGUFValueType.STRING),
                (f"{architecture}.rope.scaling.factor", 4.0, gguf.GGUFValueType.FLOAT32),
                (f"{architecture}.attention.scale", 0.3, gguf.GGUFValueType.FLOAT32),
                (f"{architecture}.logit_scale", 0.5, gguf.GGUFValueType.FLOAT32),
                (f"{architecture}.expert_count", 2, gguf.GGUFValueType.UINT32),
                (f"{architecture}.attention.sliding_window", 4, gguf.GGUFValueType.UINT32),
                (f"{architecture}.rope.dimension_count", 16, gguf.GGUFValueType.UINT32),
                (f"{architecture}.attention.causal", False, gguf.GGUFValueType.BOOL),
                ("split.count", 2, gguf.GGUFValueType.UINT16),
                ("general.note", "x", gguf.GGUFValueType.STRING),
            ]
        )
        values[key] = (value, form, form)
        said = f"new key {key} = {value!r}"
    elif act == "drop":
        tensors.pop(index)
        said = f"{name}: dropped"
    elif act == "swap":
        alike = [
            other
            for other, (_, theirs, form) in enumerate(tensors)
            if other != index and theirs.shape == data.shape and form == kind
        ]
        if not alike:
            return ""
        other = chance.choice(alike)
        tensors[index] = (name, tensors[other][1], kind)
        tensors[other] = (tensors[other][0], data, kind)
        said = f"{name}: swapped with {tensors[other][0]}"
    elif act == "flip":
        flat = data.reshape(-1).view(np.uint8).copy()
        flat[chance.randrange(len(flat))] ^= 1 << chance.randrange(8)
        tensors[index] = (name, flat.view(data.dtype).reshape(data.shape), kind)
        said = f"{name}: a bit flipped"
    else:
        tensors[index] = (name.replace("attn_q", "attn_qx").replace("ffn", "ffn_x"), data, kind)
        said = f"{name}: renamed to {tensors[index][0]}"
        if tensors[index][0] == name:
            return ""
    writer = gguf.GGUFWriter(str(file) + "_", reader.fields["general.architecture"].contents())
    for key, (value, form, inner) in values.items():
        if form == gguf.GGUFValueType.ARRAY:
            writer.add_key_value(key, value, form, sub_type=inner)
        else:
            writer.add_key_value(key, value, form)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Path(str(file) + "_").replace(file)
    return said
