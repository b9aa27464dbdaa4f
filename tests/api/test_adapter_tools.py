"""Adapters by themselves: merged, cut, shown, compared and listed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.api.adapters_of_one_base import LAYERS, a_lora

import graft
from graft.adapters.combine import COMBINATIONS, dare, dare_ties, ties
from graft.api.adapter.files import ADAPTER_REPORT
from graft.api.adapter.listing import list_adapters
from graft.api.adapter.merge import combine_adapters
from graft.api.adapter.resize import resize_adapter
from graft.api.adapter.show import compare_adapters, show_adapter
from graft.api.run.folder import load_any
from graft.cli.main import main
from graft.errors import GraftError
from graft.model.adapter_files import load_adapter
from graft.model.lora_files import read_lora
from graft.model.targets import freeze_layers


def update(folder: Path, name: str) -> torch.Tensor:
    A, B = read_lora(folder).layers[name].update()
    return B @ A


@pytest.fixture(scope="module")
def two(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    first = a_lora(folder / "first", str(tiny_base), rank=4, seed=1, scaling=0.5)
    return first, a_lora(folder / "second", str(tiny_base), rank=6, seed=2, scaling=1.5)


@pytest.mark.parametrize("how", COMBINATIONS)
def test_merged_updates_equal_the_combination_of_the_dense_ones(
    how: str, two: tuple[Path, Path], tmp_path: Path
) -> None:
    combine = {"ties": ties, "dare": dare, "dare_ties": dare_ties}.get(how)
    settings = {"density": 0.4, "seed": 3, "energy": 1.0} if combine else {}
    settings = {"rank": 10} if how == "svd" else settings
    combine_adapters(two, tmp_path / "merged", weights=[0.7, -0.2], how=how, **settings)
    draws = torch.Generator().manual_seed(3)
    for name in sorted(LAYERS):
        dense = [update(folder, name) for folder in two]
        expected = 0.7 * dense[0] - 0.2 * dense[1]
        if combine is not None:
            expected = combine(dense, [0.7, -0.2], 0.4, draws)
        torch.testing.assert_close(update(tmp_path / "merged", name), expected, rtol=0, atol=1e-6)


def test_a_cut_combination_is_the_nearest_one(two: tuple[Path, Path], tmp_path: Path) -> None:
    report = combine_adapters(two, tmp_path / "merged", how="svd")
    assert set(report.ranks.values()) == {6} and report.weights == (0.5, 0.5)
    lost = total = 0.0
    for name in LAYERS:
        values = torch.linalg.svdvals(sum(update(folder, name) for folder in two) / 2)
        lost, total = lost + values[6:].square().sum(), total + values.square().sum()
        found = torch.linalg.svdvals(update(tmp_path / "merged", name))
        torch.testing.assert_close(found[:6], values[:6], rtol=1e-5, atol=0)
    assert report.relative_error == pytest.approx(float(lost / total) ** 0.5)


@pytest.mark.parametrize("how", ["linear", "svd", "ties"])
def test_an_adapter_merged_with_itself_is_itself(
    how: str, two: tuple[Path, Path], tmp_path: Path
) -> None:
    density = 1.0 if how == "ties" else None
    combine_adapters([two[0], two[0]], tmp_path / "merged", how=how, density=density)
    for name in LAYERS:
        torch.testing.assert_close(update(tmp_path / "merged", name), update(two[0], name))


def test_a_model_computes_the_sum_of_what_was_merged(
    two: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    combine_adapters(two, tmp_path / "merged", weights=[1, 1])
    logits = []
    for adapters in (two, [tmp_path / "merged"]):
        loaded = load_any(tiny_base, "float32", "cpu")
        freeze_layers(loaded.model, [*LAYERS])
        for number, folder in enumerate(adapters):
            load_adapter(loaded.model, folder, f"adapter{number}")
        with torch.no_grad():
            logits.append(loaded.model(input_ids=torch.arange(40, 60)[None]).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-5)


def test_factors_themselves_are_combined_where_that_is_asked(
    two: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    third = a_lora(tmp_path / "third", str(tiny_base), rank=4, seed=7, scaling=0.5)
    combine_adapters([two[0], third], tmp_path / "merged", weights=[1, 4], factors=True)
    one, other = read_lora(two[0]), read_lora(third)
    for name in LAYERS:
        A = read_lora(tmp_path / "merged").layers[name].A
        expected = 0.5**0.5 * one.layers[name].A + 2.0**0.5 * other.layers[name].A
        torch.testing.assert_close(A, expected)
    with pytest.raises(GraftError, match=r"ranks \[4, 6\] cannot be added"):
        combine_adapters(two, tmp_path / "out", factors=True)


def test_what_cannot_be_merged_is_told_at_once(
    two: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(GraftError) as told:
        combine_adapters(two[:1], tmp_path / "out", weights=[1, 2], how="ties", rank=1, energy=0.5)
    for words in ("two adapters or more", "2 values for 1 adapters", "--density is missing"):
        assert words in str(told.value)
    with pytest.raises(GraftError, match="give one of --rank and --energy"):
        combine_adapters(two, tmp_path / "out", how="svd", rank=1, energy=0.5)
    with pytest.raises(GraftError, match="--rank is 0"):
        combine_adapters(two, tmp_path / "out", how="svd", rank=0)
    with pytest.raises(GraftError, match="linear keeps the sum of the ranks"):
        combine_adapters(two, tmp_path / "out", rank=2)
    starts = shutil.copytree(two[0], tmp_path / "starts")
    own = json.loads((starts / "graft_adapter.json").read_text())
    (starts / "graft_adapter.json").write_text(json.dumps(own | {"init": "loftq"}))
    with pytest.raises(GraftError, match="started as loftq, and makes up for the rounding"):
        combine_adapters([starts, two[1]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [{"rank": 2}, {"energy": 0.8}, {"rank": 99}])
def test_a_resized_adapter_is_the_nearest_of_its_ranks(
    cut: dict[str, float], two: tuple[Path, Path], tmp_path: Path
) -> None:
    report = resize_adapter(two[1], tmp_path / "small", **cut)
    lost = total = 0.0
    for name, layer in read_lora(tmp_path / "small").layers.items():
        dense = update(two[1], name)
        values = torch.linalg.svdvals(dense)
        rank, energy = layer.rank, values.square().cumsum(0) / values.square().sum()
        if "energy" in cut:
            assert energy[rank - 1] >= 0.8 and (rank == 1 or energy[rank - 2] < 0.8)
        else:
            assert rank == min(cut["rank"], 6)
        left = (dense - update(tmp_path / "small", name)).square().sum()
        torch.testing.assert_close(left, values[rank:].square().sum(), rtol=1e-4, atol=1e-9)
        lost, total = lost + float(left), total + float(values.square().sum())
    assert report.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-5)
    written = json.loads((tmp_path / "small" / ADAPTER_REPORT).read_text())
    assert written["parameters"] == report.parameters <= report.parameters_before


def test_an_adapter_that_is_no_lora_is_refused_with_what_to_do(
    tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    for method, words in (("affine", "it is of method affine"), ("lora", "it has use_dora")):
        out = tmp_path / method
        config = graft.TrainConfig(
            model=str(tiny_base),
            data=str(rows),
            out=str(out),
            steps=2,
            method=method,
            dora=method == "lora",
            device="cpu",
        )
        graft.finetune(config)
        with pytest.raises(GraftError, match=words) as told:
            resize_adapter(out, tmp_path / "small", rank=2)
        assert "graft adapter extract BASE RUN" in str(told.value)


def test_shown_figures_are_those_of_the_dense_update(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    shown = show_adapter(two[0], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    for name, layer in shown.layers.items():
        dense = update(two[0], name)
        values = torch.linalg.svdvals(dense)[:4]
        torch.testing.assert_close(torch.tensor(layer.singular_values).double(), values)
        assert layer.norm == pytest.approx(float(dense.norm()))
        assert 1 <= layer.effective_rank <= 4 and 1 <= layer.rank_95 <= 4
    assert shown.parameters == sum(4 * sum(shape) for shape in LAYERS.values())


def test_compared_figures_are_those_of_the_dense_updates(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    same = compare_adapters(two[0], two[0])
    assert same.cosine == pytest.approx(1)
    for layer in same.layers.values():
        assert layer.cosine == pytest.approx(1) and layer.norm_ratio == pytest.approx(1)
        assert layer.input_similarity == pytest.approx(1)
    found = compare_adapters(*two, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    dense = [torch.cat([update(folder, name).flatten() for name in LAYERS]) for folder in two]
    expected = torch.nn.functional.cosine_similarity(*dense, dim=0)
    assert found.cosine == pytest.approx(float(expected), abs=1e-6)
    for name, layer in found.layers.items():
        U, _, Vh = zip(*(torch.linalg.svd(update(folder, name)) for folder in two), strict=True)
        inputs = (Vh[0][:4] @ Vh[1][:6].T).square().sum() / 4
        outputs = (U[0][:, :4].T @ U[1][:, :6]).square().sum() / 4
        assert layer.input_similarity == pytest.approx(float(inputs), abs=1e-6)
        assert layer.output_similarity == pytest.approx(float(outputs), abs=1e-6)


def test_every_adapter_below_a_folder_is_a_row(
    two: tuple[Path, Path], tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    shutil.copytree(two[0], tmp_path / "adapters" / "first")
    damaged = shutil.copytree(two[1], tmp_path / "adapters" / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"no")
    config = graft.TrainConfig(
        model=str(tiny_base),
        data=str(rows),
        out=str(tmp_path / "run"),
        steps=2,
        device="cpu",
        method="merge_aware",
    )
    graft.finetune(config)
    found = {Path(one.name).name: one for one in list_adapters([tmp_path])}
    assert set(found) == {"first", "damaged", "run"}
    assert found["damaged"].problem and "adapter_model.safetensors" in found["damaged"].problem
    assert found["first"].ranks == (4,) and found["first"].method == "lora"
    assert found["first"].targets == {"q_proj": 2, "down_proj": 2}
    assert found["run"].method == "merge_aware" and found["run"].targets["q_proj"] == 2
    with pytest.raises(GraftError, match="there is no folder"):
        list_adapters([tmp_path / "nowhere"])


def test_the_commands(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> int:
        return main(["adapter", *map(str, words)])

    assert run("merge", *two, "--out", tmp_path / "sum", "--weights", 1, "0.5") == 0
    assert "2 adapters by linear: 4 layers, rank 10" in capsys.readouterr().out
    assert run("resize", tmp_path / "sum", "--energy", 0.9, "--out", tmp_path / "small") == 0
    assert "of the update is left out" in capsys.readouterr().out
    assert run("list", tmp_path, "--json") == 0
    listed = json.loads(capsys.readouterr().out)["adapters"]
    assert [Path(one["name"]).name for one in listed] == ["small", "sum"]
    assert run("list", tmp_path) == run("show", two[0]) == run("compare", *two) == 0
    assert "effective rank" in capsys.readouterr().out
    assert run("compare", *two, "--json", "--picture", tmp_path / "pair.png") == 0
    assert json.loads(capsys.readouterr().out)["layers"] and (tmp_path / "pair.png").is_file()
    assert run("mrege") == 2
    assert "unknown adapter command 'mrege'; did you mean 'merge'?" in capsys.readouterr().err
    assert run() == run("--help") == 0
    assert "usage: graft adapter COMMAND" in capsys.readouterr().out
    assert run("merge", two[0], "--out", tmp_path / "one") == 1
    assert "graft adapter merge: error" in capsys.readouterr().err
