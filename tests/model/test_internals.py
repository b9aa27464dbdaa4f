"""What lies beyond PyTorch's and Transformers' public interfaces still does what it is used for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import graft.model
from graft.model.internals import (
    arguments_of,
    attention_of,
    initialise,
    name_of,
    with_child,
    writes_to,
)

PRIVATE = {
    "_modules",
    "_parameters",
    "_buffers",
    "_schema",
    "_is_hf_initialized",
    "_version",
    "_attn_implementation",
}


def test_an_operation_says_its_name_and_arguments() -> None:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert name_of(op) == "aten::_scaled_dot_product_flash_attention_for_cpu"
    names = {argument.name: argument.default_value for argument in arguments_of(op)}
    assert list(names)[:4] == ["query", "key", "value", "dropout_p"]
    assert names["dropout_p"] == 0.0


def test_another_child_leaves_the_model_as_it_is(load) -> None:
    model = load("llama").model
    child, body = torch.nn.Identity(), model.model
    changed = with_child(model, "model", child)
    assert changed.model is child and model.model is body
    assert changed.lm_head is model.lm_head


@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_rotary_frequencies_are_computed_anew(family, load) -> None:
    model = load(family).model
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    writes = {name: writes_to(buffer.zero_()) for name, buffer in model.named_buffers()}
    initialise(model)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
        assert writes_to(buffer) > writes[name], name


def test_the_attention_of_a_model_has_a_name(load) -> None:
    model = load("llama").model
    model.set_attn_implementation("eager")
    assert attention_of(model) == "eager"


def test_nothing_else_in_the_model_uses_them() -> None:
    found = []
    for path in Path(graft.model.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            private = isinstance(node, ast.Attribute) and node.attr in PRIVATE
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if private or (module.startswith(("torch", "transformers")) and "._" in module):
                found.append(path.name)
    assert set(found) == {"internals.py"}
