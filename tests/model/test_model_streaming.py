"""Peak memory: a weight is read, quantised and dropped in turn; a quantised folder is mapped."""

from __future__ import annotations

import json
import mmap
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft.formats.registry import make_format
from graft.model.load import load_model
from graft.model.running.memory import peak_bytes, resident_bytes
from graft.model.weight_files import WeightFiles

LINUX = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc"
)
MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
import pydantic, torch  # graft.json is checked with pydantic
from graft.formats.registry import make_format
from graft.model.load import load_model
from graft.model.save import save_model

torch.set_num_threads(1)
big, small, out = sys.argv[1:]

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

def measured(folder, weight_format=None):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or freed room would hide what is taken next
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, anonymous = status("VmRSS"), status("RssAnon")
    loaded = load_model(folder, weight_format=weight_format, dtype="float32", device="cpu")
    return loaded, status("VmHWM") - before, status("RssAnon") - anonymous

figures = {}
for name, options in (("int", {}), ("nf4", {"double_quant": True}), ("int8", {})):
    weight_format = make_format(name, options)
    measured(small, weight_format)  # what is imported and cached on first use
    loaded, figures[name], _ = measured(big, weight_format)
    if name == "int":
        save_model(loaded, Path(out))
    del loaded
loaded, _, figures["mapped_private"] = measured(out)
path = str(Path(out).resolve() / "model.safetensors")
start, end = next(
    [int(part, 16) for part in line.split()[0].split("-")]
    for line in Path("/proc/self/maps").read_text().splitlines()
    if line.endswith(path)
)
layer = loaded.model.model.layers[0].mlp.up_proj
figures["inside"] = all(start <= tensor.data_ptr() < end for tensor in layer.packed.values())
print(json.dumps(figures))
"""
LARGEST = 4 * 512 * 2048


@pytest.fixture(scope="module")
def figures(checkpoint, tmp_path_factory) -> dict[str, float]:
    """Growth of the resident memory in bytes while a model of 84 MB is loaded, in a fresh process.

    5 layers of 4 matrices 512 x 512 and 3 of 2048 x 512 in float32.
    """
    folder = tmp_path_factory.mktemp("big")
    config = LlamaConfig(
        vocab_size=320, hidden_size=512, intermediate_size=2048, num_hidden_layers=5,
        num_attention_heads=8, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    small = checkpoint("llama")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small / file, folder / file)
    assert (folder / "model.safetensors").stat().st_size > 80e6
    out = tmp_path_factory.mktemp("out") / "q"
    command = [sys.executable, "-c", MEASURE, str(folder), str(small), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {
        "file": (out / "model.safetensors").stat().st_size
    }


@LINUX
@pytest.mark.parametrize(
    # Bits per weight, and room for one matrix, its temporaries and what the heap scatters; the
    # source of 84 MB, were it kept, would go far beyond.
    ("name", "bits", "copies"),
    [("int", 5, 8), ("nf4", 4.13, 14), ("int8", 8.1, 8)],
)
def test_peak_is_the_quantised_model_and_the_work_on_one_tensor(
    name, bits, copies, figures
) -> None:
    quantised = 5 * (4 * 512 * 512 + 3 * 512 * 2048) * bits / 8 + 320 * 512 * 4
    assert quantised < figures[name] < quantised + copies * LARGEST


@LINUX
def test_a_quantised_folder_is_memory_mapped(figures) -> None:
    assert figures["inside"]
    # Nothing but Python objects is private to the process.
    assert figures["mapped_private"] < figures["file"] / 4


@pytest.mark.parametrize(("name", "options"), [("int", {"bits": 8}), ("nf4", {}), ("int8", {})])
def test_one_weight_at_a_time_is_alive(name, options, checkpoint, monkeypatch) -> None:
    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    counts = []
    read_once = WeightFiles.read_once

    def counting(files: WeightFiles, key: str) -> torch.Tensor:
        counts.append(len(alive))
        tensor = read_once(files, key)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(WeightFiles, "read_once", counting)
    weight_format = make_format(name, options)
    loaded = load_model(str(checkpoint("llama")), weight_format=weight_format, device="cpu")
    assert counts == [0] * 14
    assert loaded.model.training is False and not alive


def test_resident_and_peak_memory() -> None:
    cpu = torch.device("cpu")
    before = resident_bytes(cpu)
    # Mapped by hand: what the allocator keeps of a freed tensor depends on who ran before.
    block = mmap.mmap(-1, 1 << 28)
    torch.frombuffer(block, dtype=torch.float32).fill_(1)
    assert 250e6 < resident_bytes(cpu) - before < 290e6
    assert peak_bytes(cpu) >= resident_bytes(cpu) - 4096 * 256
    block.close()
    assert resident_bytes(cpu) - before < 10e6 <= peak_bytes(cpu)
