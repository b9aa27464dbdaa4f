"""Layers that are mapped and do not fit into memory are read before their turn, and change nothing.

Memory is short where the test says so: a model that would not fit takes too long.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.formats.registry import make_format
from graft.model.load import load_model
from graft.model.running import prefetch
from graft.model.running.checkpointing import CHECKPOINTING, Checkpointing, enable_checkpointing
from graft.model.running.loss import target_loss
from graft.model.running.prefetch import LayerPrefetch, prefetch_layers
from graft.model.save import save_model
from graft.model.targets import select_targets

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads ahead on Linux only")

LAYERS = 5
NO_MEMORY = 0


@pytest.fixture(scope="module")
def quantised(checkpoint, tmp_path_factory) -> Path:
    """A folder of 5 decoder layers in nf4, each of some 60 pages."""
    plain, packed = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("packed") / "q"
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=320, hidden_size=192, intermediate_size=480, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(plain)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint("llama") / file, plain / file)
    weight_format = make_format("nf4", {"double_quant": True})
    loaded = load_model(str(plain), weight_format=weight_format, dtype="float32", device="cpu")
    save_model(loaded, packed)
    return packed


@pytest.fixture
def model(quantised: Path) -> PreTrainedModel:
    return adapted(quantised, "layers")


def adapted(folder: Path, checkpointing: Checkpointing) -> PreTrainedModel:
    """The mapped model with LoRA."""
    torch.manual_seed(1)
    loaded = load_model(str(folder), dtype="float32", device="cpu").model
    enable_checkpointing(loaded, checkpointing)
    attach_adapter(loaded, select_targets(loaded, ()), AdapterConfig(method="lora", rank=2))
    for parameter in adapter_parameters(loaded, "default").values():
        torch.nn.init.normal_(parameter, std=0.1)
    return loaded


def step(model: PreTrainedModel) -> list[Tensor]:
    """Take the gradients of a training step."""
    ids = torch.arange(24).reshape(2, 12) + 7
    model.train()
    target_loss(model, ids, ids)[0].backward()
    gradients = []
    for parameter in adapter_parameters(model, "default").values():
        assert parameter.grad is not None
        gradients.append(parameter.grad)
        parameter.grad = None
    return gradients


@pytest.fixture
def log(monkeypatch) -> list[tuple[str, int]]:
    """What happened: (turn | read | let go, layer)."""
    events: list[tuple[str, int]] = []
    read, advise, begin = LayerPrefetch._read, LayerPrefetch._advise, LayerPrefetch.begin

    def logged_read(self: LayerPrefetch, layer: int) -> None:
        read(self, layer)
        events.append(("read", layer))

    def logged_advise(self: LayerPrefetch, layer: int, advice: int) -> None:
        advise(self, layer, advice)
        if advice == prefetch._COLD:
            events.append(("let go", layer))

    def logged_begin(self: LayerPrefetch, layer: int, direction: int) -> None:
        begin(self, layer, direction)
        events.append(("turn", layer))

    monkeypatch.setattr(LayerPrefetch, "_read", logged_read)
    monkeypatch.setattr(LayerPrefetch, "_advise", logged_advise)
    monkeypatch.setattr(LayerPrefetch, "begin", logged_begin)
    return events


def of(kind: str, log: list[tuple[str, int]]) -> list[int]:
    return [layer for name, layer in log if name == kind]


def test_gradients_and_logits_are_the_same_bit_for_bit(model) -> None:
    ids = torch.arange(8)[None]
    expected = step(model)
    with torch.no_grad():
        logits = model.eval()(ids).logits
    with prefetch_layers(model, NO_MEMORY) as reading:
        assert reading is not None
        for _ in range(2):
            found = step(model)
            assert all(map(torch.equal, found, expected))
            with torch.no_grad():
                assert torch.equal(model.eval()(ids).logits, logits)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_each_layer_is_there_at_its_turn_forward_and_backward(
    checkpointing, quantised, log
) -> None:
    model = adapted(quantised, checkpointing)
    step(model)  # the first loss of a model looks at its head in a pass of its own
    there_and_back = [*range(LAYERS), *reversed(range(LAYERS))]
    with prefetch_layers(model, NO_MEMORY):
        step(model)
        step(model)
    # Layer 0 goes on from the backward pass to the next forward pass: it is there.
    assert of("turn", log) == there_and_back + there_and_back[1:]
    for place, (name, layer) in enumerate(log):
        if name == "turn":
            before = [event for event in log[:place] if event[1] == layer and event[0] != "turn"]
            assert before[-1] == ("read", layer)


def test_the_next_layers_are_read_while_one_computes(model, log) -> None:
    with prefetch_layers(model, NO_MEMORY) as reading:
        for layer in (0, 1, 2):
            reading.begin(layer, 1)
        settle(reading)
        assert of("read", log) == [0, 1, 2, 3, 4]
        assert of("let go", log) == [0, 1]
        for turn in ((3, 1), (4, 1), (4, -1), (3, -1)):
            reading.begin(*turn)
        settle(reading)
        assert of("let go", log) == [0, 1, 2, 3, 4]
        # 3 and 2 were let go on the way there, and are read (from the cache) on the way back.
        assert of("read", log) == [0, 1, 2, 3, 4, 3, 2, 1]


def settle(reading: LayerPrefetch) -> None:
    """Wait until the thread has nothing left to do."""
    for layer in reading._order(*reading.turn):
        with reading._changed:
            assert reading._changed.wait_for(lambda layer=layer: layer in reading._ready, 10)


def test_passes_without_gradients_begin_at_the_front_again(model, log) -> None:
    with prefetch_layers(model, NO_MEMORY) as reading, torch.no_grad():
        for layer in range(LAYERS):
            reading.begin(layer, 1)
        assert reading._order(LAYERS - 1, 1) == [LAYERS - 1, 0, 1]
        settle(reading)
    assert of("read", log)[:7] == [0, 1, 2, 3, 4, 0, 1]


def test_pages_come_from_the_disk_before_they_are_touched(quantised, tmp_path) -> None:
    folder = Path(shutil.copytree(quantised, tmp_path / "fresh"))  # that nobody else has mapped
    with (folder / "model.safetensors").open("rb") as opened:
        os.fsync(opened.fileno())
        model = adapted(folder, "layers")
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    ranges = prefetch._mapped_ranges(model.model.layers)
    assert all(ranges)
    packed = sum(p.nbytes for p in model.model.layers.parameters() if not p.requires_grad)
    spanned = sum(end - begin for layer in ranges for begin, end in layer)
    assert packed <= spanned < packed + 4 * LAYERS * 8 * mmap.PAGESIZE
    if max(map(share_in_memory, ranges)) > 0.5:
        pytest.skip("the file system does not drop its cache when it is asked to")
    with prefetch_layers(model, NO_MEMORY) as reading:
        reading.begin(0, 1)
        assert share_in_memory(ranges[0]) == 1
        settle(reading)
        assert share_in_memory(ranges[2]) == 1


def share_in_memory(ranges: list[tuple[int, int]]) -> float:
    """The share of pages that the page cache holds, from mincore."""
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    pages = b""
    for begin, end in ranges:
        found = ctypes.create_string_buffer((end - begin) // mmap.PAGESIZE)
        assert mincore(begin, end - begin, found) == 0
        pages += found.raw
    return sum(page & 1 for page in pages) / len(pages)


def test_a_model_that_fits_is_left_alone(model) -> None:
    packed = sum(p.nbytes for p in model.model.layers.parameters() if not p.requires_grad)
    with prefetch_layers(model, 2 * packed) as reading:
        assert reading is None
        assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    with prefetch_layers(model, packed) as reading:
        assert reading is not None


def test_a_model_that_is_not_mapped_is_left_alone(quantised) -> None:
    loaded = load_model(str(quantised), dtype="float32", device="cpu").model
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    with prefetch_layers(loaded, NO_MEMORY) as reading:
        assert reading is None


def test_nothing_is_left_behind_even_after_an_error(model) -> None:
    def fail() -> None:
        with prefetch_layers(model, NO_MEMORY) as reading:
            threads.append(reading._thread)
            raise KeyboardInterrupt

    threads: list = []
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not threads[0].is_alive()
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_failed(model, monkeypatch) -> None:
    def broken(self: LayerPrefetch, layer: int) -> None:
        raise ZeroDivisionError

    expected = step(model)
    monkeypatch.setattr(LayerPrefetch, "_read", broken)
    with prefetch_layers(model, NO_MEMORY):
        assert all(map(torch.equal, step(model), expected))


def test_waiting_is_counted(model, monkeypatch) -> None:
    import time

    read: Callable[[LayerPrefetch, int], None] = LayerPrefetch._read

    def slow(self: LayerPrefetch, layer: int) -> None:
        time.sleep(0.05)
        read(self, layer)

    monkeypatch.setattr(LayerPrefetch, "_read", slow)
    with prefetch_layers(model, NO_MEMORY) as reading:
        reading.begin(0, 1)
        first = reading.waited_seconds
        assert 0.05 <= first < 1
        settle(reading)
        reading.begin(1, 1)
        assert reading.waited_seconds - first < 0.04, "it was there already"
