"""Only its own folder, and its table, asks which method, format, solver, start ... something is."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import graft
from graft.adapters.base import Adapter
from graft.adapters.method import Method
from graft.adapters.registry import METHODS
from graft.adapters.starts.base import Start
from graft.adapters.starts.registry import STARTS
from graft.calibrate.base import Solver
from graft.calibrate.registry import SOLVERS
from graft.data.shapes.base import RowShape
from graft.data.shapes.registry import SHAPES
from graft.entries import Entries
from graft.export.base import Target
from graft.export.registry import TARGETS
from graft.formats.base import WeightFormat
from graft.formats.registry import FORMATS
from graft.objectives.base import Objective
from graft.objectives.registry import OBJECTIVES
from graft.optimizers.base import OptimizerKind
from graft.optimizers.registry import OPTIMIZERS

SOURCE = Path(graft.__file__).parent


class Axis(NamedTuple):
    """What is looked up by name, and the folders that may know the names."""

    table: Entries[object]
    base: type
    homes: tuple[str, ...]


AXES = [
    Axis(METHODS, Method, ("adapters",)),
    Axis(METHODS, Adapter, ("adapters",)),
    Axis(STARTS, Start, ("adapters/starts",)),
    Axis(FORMATS, WeightFormat, ("formats",)),
    Axis(SOLVERS, Solver, ("calibrate",)),
    Axis(TARGETS, Target, ("export",)),
    Axis(SHAPES, RowShape, ("data/shapes",)),
    Axis(OBJECTIVES, Objective, ("objectives",)),
    Axis(OPTIMIZERS, OptimizerKind, ("optimizers",)),
]

EXCUSED = {
    ("kernels/", "dense"): "a kind of `Weight`, which is what kernels go by",
    ("kernels/", "int8"): "a kind of `Weight`, which is what kernels go by",
    ("kernels/packed/codebooks.py", "nf4"): "the values of that codebook",
    ("kernels/packed/codebooks.py", "fp4"): "the values of that codebook",
    ("convert/registry.py", "gptq"): "that tool's files",
    ("convert/registry.py", "mlx"): "that tool's files",
    ("convert/registry.py", "gguf"): "that tool's files",
    ("convert/registry.py", "hqq"): "that tool's files",
    ("convert/readers/hqq.py", "hqq"): "what HQQ calls itself in config.json",
    (
        "convert/readers/compressed.py",
        "dense",
    ): "compressed-tensors' word for no sparsity",
    ("convert/readers/gptq.py", "gptq"): "what a checkpoint of GPTQModel calls itself",
    ("convert/readers/autoround.py", "gptq"): "a packing of auto-round's",
    ("convert/labels/integer_settings.py", "int"): "a data type of auto-round's",
    ("convert/readers/mlx.py", "affine"): "MLX's word for scale q + offset",
    ("api/adopt_source.py", "full"): "mlx-lm's word for how it trained",
    ("api/adopt_source.py", "lora"): "mlx-lm's word for how it trained",
    ("api/adopt_source.py", "dora"): "mlx-lm's word for how it trained",
    ("api/adopt_base.py", "nf4"): "what bitsandbytes calls its grid",
    ("demo/corpus.py", "text"): "the key of a row of plain text, written to a file",
    ("demo/grammar.py", "prompt"): "the key of a row, written to a file",
    ("export/mlx/write.py", "default"): "a type of rotary positions in Transformers",
    ("model/gguf/rope.py", "default"): "a type of rotary positions in Transformers",
    ("model/gguf/tokens.py", "default"): "the name of a chat template among several",
    ("model/families.py", "gguf"): "the row of a family says what targets have for it",
    ("model/families.py", "mlx"): "the row of a family says what targets have for it",
    ("calibrate/latents.py", "LatentFormat"): "the step that rounds latent weights anew",
    ("adapters/merge_aware.py", "LatentFormat"): "the format that this method trains in",
    ("data/sources/text_file.py", "text"): "the row of a plain text file",
    ("data/sources/files.py", "text"): "a value of --data-format",
    ("data/conversations/contents.py", "text"): "a type of the parts that a content may have",
    ("data/chat.py", "messages"): "messages are handed on as those of a row",
}
"""Where a name is known elsewhere, and why: (file or folder, name)."""


class Found(NamedTuple):
    file: str
    line: int
    name: str


def _words(node: ast.AST) -> Iterator[str]:
    """The strings that a comparison, a key or a pattern is made of."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def _asked(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string that something is compared with or looked up by, and every class asked for."""
    for node in ast.walk(tree):
        asked: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asked = [one for one in sides if isinstance(one, ast.Constant | ast.Tuple | ast.Set)]
            asked += [one for one in sides if isinstance(one, ast.List)]
        elif isinstance(node, ast.Dict):
            asked = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.MatchValue):
            asked = [node.value]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "isinstance",
            "issubclass",
        ):
            for part in ast.walk(node.args[1]):
                if isinstance(part, ast.Name | ast.Attribute):
                    name = part.id if isinstance(part, ast.Name) else part.attr
                    if name[0].isupper():  # a class of ours: `int` is Python's, and a format's name
                        yield node.lineno, name
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
            "startswith",
            "endswith",
        ):
            asked = list(node.args)
        for one in asked:
            for word in _words(one):
                yield getattr(one, "lineno", 0), word


def _concrete(base: type) -> set[str]:
    """The classes of entries: those below a base that are made, not inherited from alone."""
    found = set()
    for below in base.__subclasses__():
        if below.__module__.startswith("graft.") and not inspect.isabstract(below):
            found.add(below.__name__)
        found |= _concrete(below)
    return found


def _at(file: str, places: tuple[str, ...]) -> bool:
    return any(file == place or file.startswith(place.rstrip("/") + "/") for place in places)


def _strays(source: dict[str, str]) -> tuple[list[Found], set[tuple[str, str]]]:
    """What is asked away from home, and the excuses that something needed."""
    for axis in AXES:
        axis.table.values()  # so that every class is there
    homes: dict[str, tuple[str, ...]] = {}
    for axis in AXES:
        for name in {*axis.table, *_concrete(axis.base)}:
            homes[name] = (*homes.get(name, ()), *axis.homes)
    found, used = [], set()
    for file, text in source.items():
        for line, name in _asked(ast.parse(text)):
            if name not in homes or _at(file, homes[name]):
                continue
            excuse = next((key for key in EXCUSED if key[1] == name and _at(file, key[:1])), None)
            if excuse is None:
                found.append(Found(file, line, name))
            else:
                used.add(excuse)
    return found, used


def _source() -> dict[str, str]:
    return {path.relative_to(SOURCE).as_posix(): path.read_text() for path in SOURCE.rglob("*.py")}


def test_no_file_asks_for_a_name_that_is_not_its_own() -> None:
    found, _ = _strays(_source())
    assert not found, "\n".join(f"src/graft/{one.file}:{one.line}: {one.name}" for one in found)


def test_every_excuse_is_needed() -> None:
    _, used = _strays(_source())
    assert set(EXCUSED) == used


@pytest.mark.parametrize(
    "code",
    [
        'if method == "qalora": pass',
        'if "dora" != method: pass',
        'if method in ("lora", "qlora"): pass',
        'if method in ["lora"]: pass',
        'rate = {"affine": 1.0}[method]',
        'match method:\n    case "full": pass',
        'match method:\n    case "lora" | "qlora": pass',
        "if isinstance(adapter, QALoraAdapter): pass",
        "if isinstance(adapter, base.LoraAdapter): pass",
        "if isinstance(fmt, (IntGroupFormat, int)): pass",
        "if isinstance(fmt, DenseFormat | int): pass",
        'if solver.startswith("gptq"): pass',
        'if target == "gguf": pass',
        'if config.optimizer == "adamw": pass',
    ],
)
def test_a_stray_question_is_found(code: str) -> None:
    found, _ = _strays({"train/somewhere.py": code})
    assert found


def test_no_subpackage_takes_the_place_of_a_name_of_graft() -> None:
    subpackages = {path.stem for path in SOURCE.iterdir()}
    assert not subpackages & (set(graft.__all__) - {"GraftError"})


def test_graft_compare_is_a_function_however_often_it_is_asked_for() -> None:
    config = graft.CompareConfig(model="nowhere", data="nothing.jsonl", steps=0)
    for _ in range(2):
        with pytest.raises(graft.GraftError):
            graft.compare(config)
