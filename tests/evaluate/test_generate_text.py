"""Generation: the native decoder chooses the tokens that transformers' `generate` chooses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from graft.errors import GraftError
from graft.evaluate import generate as module
from graft.evaluate.generate import decodes_natively, generate_text, generate_texts
from graft.evaluate.sampling import Sampling
from graft.kernels.backend.native_library import why_unavailable
from graft.model.load import LoadedModel, load_model

PROMPT = [40, 41, 42, 43]

needs_library = pytest.mark.skipif(
    why_unavailable() is not None, reason=f"native backend: {why_unavailable()}"
)


@pytest.fixture
def loaded(tiny_base: Path) -> LoadedModel:
    return load_model(str(tiny_base), dtype="float32", device="cpu")


@pytest.fixture
def both(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """Generate natively and through transformers."""

    def generate(**options: Any) -> tuple[str, str]:
        texts = []
        for native in (True, False):
            monkeypatch.setattr(module, "decodes_natively", lambda *_, native=native: native)
            texts.append(generate_text(loaded.model, loaded.tokenizer, PROMPT, **options))
        return texts[0], texts[1]

    return generate


@needs_library
def test_texts_are_those_of_transformers(
    loaded: LoadedModel, both: Callable[..., tuple[str, str]]
) -> None:
    loaded.model.generation_config.eos_token_id = None
    native, expected = both(max_new_tokens=40)
    assert native == expected and native
    warm = Sampling(0.8)
    samples = [both(max_new_tokens=40, sampling=warm, seed=seed) for seed in range(5)]
    assert all(native == expected for native, expected in samples)
    assert len({native for native, _ in samples}) == 5
    loaded.model.generation_config.repetition_penalty = 1.3
    penalised, expected = both(max_new_tokens=40)
    assert penalised == expected and penalised != native


@needs_library
def test_generation_ends_where_transformers_ends(
    loaded: LoadedModel, both: Callable[..., tuple[str, str]]
) -> None:
    config = loaded.model.generation_config
    config.eos_token_id = None
    whole, _ = both(max_new_tokens=500)
    assert whole.startswith(both(max_new_tokens=1)[0])
    for eos in (list(range(0, 320, 3)), 7):
        config.eos_token_id = eos
        short, expected = both(max_new_tokens=500)
        assert short == expected
    config.eos_token_id = list(range(320))
    assert both(max_new_tokens=500)[0] == both(max_new_tokens=1)[1]


@needs_library
@pytest.mark.parametrize("sampling", [Sampling(0.8, 5), Sampling(1.5, 0, 0.7)])
def test_what_is_left_to_choose_from_is_the_same_either_way(
    sampling: Sampling, loaded: LoadedModel, both: Callable[..., tuple[str, str]]
) -> None:
    loaded.model.generation_config.eos_token_id = None
    loaded.model.generation_config.update(top_k=3, top_p=0.1, temperature=9.0)  # not asked for
    samples = [both(max_new_tokens=40, sampling=sampling, seed=seed) for seed in range(3)]
    assert all(native == other for native, other in samples)
    assert len({native for native, _ in samples}) == 3
    one, _ = both(max_new_tokens=40, sampling=Sampling(2.0, top_k=1), seed=1)
    assert one == both(max_new_tokens=40)[0]
    texts = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        texts.append(both(max_new_tokens=40, sampling=sampling)[0])
    torch.set_num_threads(1)
    assert texts[0] == texts[1]


@needs_library
def test_a_text_ends_before_the_first_of_the_strings_across_tokens(
    loaded: LoadedModel, both: Callable[..., tuple[str, str]]
) -> None:
    loaded.model.generation_config.eos_token_id = None
    whole, _ = both(max_new_tokens=40, sampling=Sampling(1.0), seed=4)
    for begin in range(1, len(whole) - 8, 5):
        strings = (whole[begin : begin + 7], "never there", whole[-3:])
        pieces: list[str] = []
        options = {"sampling": Sampling(1.0), "seed": 4, "stop": strings}
        texts = both(max_new_tokens=40, on_text=pieces.append, **options)
        expected = whole[: min(whole.find(one) for one in strings if one in whole)]
        assert texts == (expected, expected)
        assert "".join(pieces) == expected * 2


@needs_library
def test_a_special_token_is_a_place_to_stop_at(
    loaded: LoadedModel, both: Callable[..., tuple[str, str]]
) -> None:
    config, ids = loaded.model.generation_config, [40, 41, 42, 43]
    config.eos_token_id = None
    config.repetition_penalty = None
    with torch.no_grad():  # the likeliest token is the special one
        loaded.model.lm_head = torch.nn.Linear(64, len(loaded.tokenizer), bias=True)
        loaded.model.lm_head.weight.zero_()
        loaded.model.lm_head.bias.copy_(torch.arange(len(loaded.tokenizer)).flip(0))
    loaded.model.requires_grad_(False)
    assert both(max_new_tokens=9, stop=["<|end|>"]) == ("", "")
    calls: list[int] = []
    generate_text(
        loaded.model, loaded.tokenizer, ids, stop=["<|end|>"], on_text=lambda _: calls.append(1)
    )
    assert not calls


def test_prompt_and_answer_have_max_length_tokens_together(loaded: LoadedModel) -> None:
    loaded.model.generation_config.eos_token_id = None
    options = {"model": loaded.model, "tokenizer": loaded.tokenizer, "prompt_ids": PROMPT}
    assert generate_text(max_length=9, **options) == generate_text(max_new_tokens=5, **options)
    assert generate_text(max_length=99, max_new_tokens=5, **options) == generate_text(
        max_new_tokens=5, **options
    )
    with pytest.raises(GraftError, match="4 tokens, and --max-length 4 counts them too"):
        generate_text(max_length=4, **options)


def test_what_cannot_be_is_told_at_once(loaded: LoadedModel) -> None:
    with pytest.raises(GraftError) as told:
        generate_text(
            loaded.model,
            loaded.tokenizer,
            PROMPT,
            sampling=Sampling(-1.0, -2, 1.5),
            max_new_tokens=0,
            stop=[""],
        )
    for flag in ("--temperature", "--top-k", "--top-p", "--max-new-tokens", "--stop"):
        assert flag in str(told.value)
    with pytest.raises(GraftError, match="--temperature 0 samples nothing"):
        generate_text(loaded.model, loaded.tokenizer, PROMPT, sampling=Sampling(0.0, 5))


@needs_library
def test_streamed_pieces_join_to_the_text(both: Callable[..., tuple[str, str]]) -> None:
    pieces: list[str] = []
    native, expected = both(max_new_tokens=30, on_text=pieces.append)
    assert "".join(pieces) == native + expected
    assert len(pieces) > 4


@needs_library
def test_settings_that_are_not_known_go_to_transformers(loaded: LoadedModel) -> None:
    def natively(positions: int = 20, **settings: Any) -> bool:
        model: PreTrainedModel = loaded.model
        before = {name: getattr(model.generation_config, name) for name in settings}
        model.generation_config.update(**settings)
        answer = decodes_natively(model, positions)
        model.generation_config.update(**before)
        return answer

    assert natively()
    assert natively(repetition_penalty=1.2, num_beams=1, temperature=0.6, do_sample=True, top_k=5)
    assert not natively(num_beams=2)
    assert not natively(no_repeat_ngram_size=2)
    assert not natively(suppress_tokens=[3])
    assert not natively(min_new_tokens=4)


def test_no_room(loaded: LoadedModel) -> None:
    with pytest.raises(GraftError, match="the prompt is empty"):
        generate_text(loaded.model, loaded.tokenizer, [])
    with pytest.raises(GraftError, match="64 tokens; the model takes 64"):
        generate_text(loaded.model, loaded.tokenizer, [1] * 64)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beam_groups": 2, "num_beams": 2},
        {"suppress_tokens": "x"},
        {"num_beams": 3},
        {"stop_strings": 3},
        {"repetition_penalty": "x"},
    ],
)
def test_a_generation_that_cannot_be_is_told_by_its_file(
    asked: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | asked))
    with pytest.raises(GraftError, match=r"base/generation_config\.json"):
        loaded = load_model(folder, dtype="float32", device="cpu")
        generate_text(loaded.model, loaded.tokenizer, PROMPT, on_text=print)


@needs_library
@pytest.mark.parametrize("native", [True, False])
def test_what_a_listener_raises_is_its_own(
    native: bool, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang_up(text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(module, "decodes_natively", lambda *_: native)
    with pytest.raises(BrokenPipeError):
        generate_text(loaded.model, loaded.tokenizer, PROMPT, max_new_tokens=4, on_text=hang_up)


def test_several_texts_are_those_of_each_prompt_alone(loaded: LoadedModel) -> None:
    model, tokenizer = loaded.model, loaded.tokenizer
    model.generation_config.eos_token_id = list(range(0, 320, 9))
    prompts = [[40 + n, *range(60, 60 + n % 7)] for n in range(20)]  # more than go on together
    for options in ({}, {"sampling": Sampling(0.9), "seed": 3}):
        done: list[int] = []
        options = {"max_new_tokens": 30, **options}
        texts = generate_texts(model, tokenizer, prompts, on_done=done.append, **options)
        alone = [generate_text(model, tokenizer, prompt, **options) for prompt in prompts]
        assert texts == alone
        assert done == list(range(1, 21))
        assert len(set(map(len, texts))) > 3
    assert generate_texts(model, tokenizer, []) == []
    with pytest.raises(GraftError, match="64 tokens; the model takes 64"):
        generate_texts(model, tokenizer, [[1], [1] * 64])


@needs_library
def test_a_long_text_sends_no_other_to_transformers(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded.model, loaded.tokenizer
    model.generation_config.eos_token_id = None
    monkeypatch.setattr(module, "decodes_natively", lambda _, positions: positions <= 12)
    sent: list[list[int]] = []
    generated = module._generated

    def noted(*arguments: Any) -> list[int]:
        sent.append(arguments[2])
        return generated(*arguments)

    monkeypatch.setattr(module, "_generated", noted)
    prompts, done = [[40], [41] * 9, [42, 43]], list[int]()
    texts = generate_texts(model, tokenizer, prompts, max_new_tokens=8, on_done=done.append)
    assert sent == [prompts[1]] and done == [1, 2, 3]
    alone = [generate_text(model, tokenizer, one, max_new_tokens=8) for one in prompts]
    assert texts == alone
