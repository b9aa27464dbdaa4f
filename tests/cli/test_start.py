"""What a command imports until its work begins: nothing of what graft never uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import transformers
from transformers.utils import import_utils

from graft.model import imports

_NEVER = [
    *("torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor"),
    *("triton", "accelerate", "peft", "sklearn", "scipy", "torchvision", "torchao", "pandas"),
    *("bitsandbytes", "hqq", "onnx", "onnxruntime", "openvino", "tensorboard"),
]
"""Modules that none of the commands imports on a CPU; most of them Transformers would."""

_COMMANDS = """
import json, os, sys
from graft.cli import main
found = {}
for words, never in json.loads(sys.argv[1]):
    status = main._main(words, own=True)
    assert status == 0, (words, status)
    found[words[0]] = [name for name in never if name in sys.modules]
print("found", json.dumps(found), flush=True)
os._exit(0)
"""


def child(program: str, *words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(*commands: tuple[list[str], list[str]]) -> dict[str, list[str]]:
    """Run commands one after the other in one process; return what was there after each."""
    lines = child(_COMMANDS, json.dumps(commands)).splitlines()
    found: dict[str, list[str]] = json.loads(lines[-1].removeprefix("found "))
    return found


def test_commands_with_a_model_import_nothing_that_graft_never_uses(
    tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    run, model, data = str(tmp_path / "run"), str(tiny_base), str(rows)
    no_plots = [*_NEVER, "matplotlib"]
    train = ["train", "--model", model, "--data", data, "--out", run, "--steps", "1"]
    found = imported(
        (["plan", "--model", model], [*no_plots, "pyarrow", "gguf"]),
        (["data", model, data, "--rows", "1"], no_plots),
        (["generate", model, "--prompt", "a", "--max-new-tokens", "2"], no_plots),
        (["eval", model, "--data", data], no_plots),
        ([*train, "--max-length", "64"], _NEVER),
        (["merge", run, "--out", str(tmp_path / "merged")], _NEVER),
        (["export", run, "--to", "gguf", "--out", str(tmp_path / "run.gguf")], _NEVER),
    )
    assert found == dict.fromkeys(
        ["plan", "data", "generate", "eval", "train", "merge", "export"], []
    )


def test_commands_without_a_model_import_neither_transformers_nor_more(tmp_path: Path) -> None:
    heavy = [*_NEVER, "transformers", "tokenizers", "matplotlib", "pyarrow"]
    found = imported((["runs", str(tmp_path)], [*heavy, "torch"]), (["doctor"], heavy))
    assert found == {"runs": [], "doctor": []}


def test_what_is_imported_later_is_the_real_thing() -> None:
    child(
        "import sys\n"
        "from graft.model.imports import import_models\n"
        "import_models()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "import torch\n"
        "from transformers.masking_utils import TransformGetItemToIndex\n"
        "with TransformGetItemToIndex() as mode:\n"
        "    assert type(mode).__module__.startswith('torch._dynamo')\n"
        "assert hasattr(torch._dynamo, 'optimize')\n"
        "weight = torch.ones(2, requires_grad=True)\n"
        "weight.grad = torch.ones(2)\n"
        "torch.optim.AdamW([weight], lr=1.0).step()\n"
        "assert weight.requires_grad and weight[0] < 0.1\n"
    )


def test_transformers_is_imported_as_usual_where_it_asks_for_more(tmp_path: Path) -> None:
    package = tmp_path / "transformers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("modeling_utils", "masking_utils"):
        (package / f"{name}.py").write_text(
            "import torch._dynamo\nfound = hasattr(torch._dynamo, 'optimize')\n"
        )
    program = (
        "import sys\n"
        "from graft.model.imports import import_models\n"
        "import_models()\n"
        "assert not {'transformers', 'torch._dynamo'} & set(sys.modules)\n"
        "import transformers.modeling_utils as asked\n"
        "assert asked.found and asked.__file__.startswith(sys.argv[1])\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    child(program, str(tmp_path), PYTHONPATH=path)


def test_the_names_of_models_files_are_read_as_transformers_reads_them() -> None:
    quick = SimpleNamespace(
        create_import_structure_from_path=import_utils.create_import_structure_from_path,
        fetch__all__=import_utils.fetch__all__,
        is_accelerate_available=import_utils.is_accelerate_available,
    )
    imports._look_once(quick)
    models = Path(transformers.__file__).parent / "models"
    files = [file for name in ("llama", "auto", "gpt2") for file in (models / name).glob("*.py")]
    assert any(import_utils.fetch__all__(file.read_text()) for file in files)
    for file in files:
        text = file.read_text()
        assert quick.fetch__all__(text) == import_utils.fetch__all__(text)
    for text in ("", "x = '__all__'", "__all__ = ['a']", "__all__ = [\n  'a',\n]\n__all__ = ['b']"):
        assert quick.fetch__all__(text) == import_utils.fetch__all__(text)
    assert quick.is_accelerate_available("1.0") is False  # with a version, as some ask
    folder = models / "llama"
    expected = import_utils.create_import_structure_from_path(str(folder))
    assert quick.create_import_structure_from_path(folder) == expected
    assert quick.create_import_structure_from_path(str(folder / "__init__.py")) == expected


def test_the_command_ends_as_python_does() -> None:
    program = (
        "import atexit, sys\n"
        "from graft.cli.main import main\n"
        "atexit.register(print, 'ended')\n"
        "sys.argv = ['graft', 'nonsense']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "ended\n")
    assert done.stderr.startswith("graft: unknown command 'nonsense'")


def test_the_command_waits_for_no_idle_pool() -> None:
    program = (
        "import sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "pool = ThreadPoolExecutor(1)\n"
        "pool.submit(print, 'worked').result()\n"
        "from graft.cli.main import main\n"
        "sys.argv = ['graft', '--version']\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("worked\ngraft ")
