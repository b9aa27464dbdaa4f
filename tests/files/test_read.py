import os
import time
from dataclasses import dataclass

import pytest

from graft.errors import GraftError
from graft.files.read import LARGE_JSON_BYTES, read_bytes, read_json, read_typed, read_yaml


@dataclass(frozen=True)
class Stored:
    step: int
    share: float
    names: tuple[str, ...]
    note: str | None = None


def test_a_dataclass_is_read_with_its_types(tmp_path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"step": 3, "share": 1, "names": ["a", "b"], "later": {}}')
    assert read_typed(file, Stored) == Stored(3, 1.0, ("a", "b"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"step": "3", "share": 0.5, "names": []}', "step is '3'"),
        ('{"step": true, "share": 0.5, "names": []}', "step is True"),
        ('{"step": 1.5, "share": 0.5, "names": []}', "step is 1.5"),
        ('{"step": 1, "share": null, "names": []}', "share is None"),
        ('{"step": 1, "share": 0.5, "names": "ab"}', "names is 'ab'"),
        ('{"step": 1, "share": 0.5, "names": [1]}', "names.0 is 1"),
        ('{"share": 0.5, "names": []}', "step is missing"),
        ("[]", "holds a list; expected a JSON object"),
        ("", "is no valid JSON"),
        ("[" * 100_000, "is no valid JSON: it is nested too deeply"),
        ('{"step": ' + "9" * 100_000 + "}", "is no valid JSON"),
    ],
)
def test_what_does_not_fit_is_named(text, said, tmp_path) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(GraftError) as caught:
        read_typed(file, Stored)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_large_value_costs_a_short_message(tmp_path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"step": "' + "x" * 300_000 + '", "share": 0, "names": ["\\u001b[31m"]}')
    with pytest.raises(GraftError) as caught:
        read_typed(file, Stored)
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)


def test_pipes_devices_and_folders_are_refused_at_once(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, os.devnull, "/dev/zero"):
        with pytest.raises(GraftError, match="no regular file"):
            read_bytes(type(tmp_path)(path))


def test_bounds_are_settable(tmp_path, monkeypatch) -> None:
    (tmp_path / "a").write_bytes(bytes(101))
    with pytest.raises(GraftError, match=r"more than 100 bytes; at most 100 are taken.*GRAFT_B"):
        read_bytes(tmp_path / "a", 100)
    monkeypatch.setenv("GRAFT_BOUNDS", "2")
    assert len(read_bytes(tmp_path / "a", 100)) == 101
    monkeypatch.setenv("GRAFT_BOUNDS", "wide")
    with pytest.raises(GraftError, match="GRAFT_BOUNDS is 'wide'; expected a number"):
        read_bytes(tmp_path / "a", 100)


def test_anchors_may_share_but_not_multiply(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: &a [1, 2]\nb: *a\n")
    assert read_yaml(file) == {"a": [1, 2], "b": [1, 2]}
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    file.write_text("\n".join(levels))
    with pytest.raises(GraftError, match="values, repeated by anchors; at most 10,000"):
        read_yaml(file)
    file.write_text("a: &a [*a]\n")
    with pytest.raises(GraftError, match="repeated by anchors"):
        read_yaml(file)


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system [true]",
        "[" * 5000,
        "a: 2020-99-99",
        "a: {b",
        "1",
        "a: !!timestamp x",
    ],
)
def test_yaml_that_is_none_of_ours(text, tmp_path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(GraftError, match=r"a\.yaml (is no valid YAML|holds no settings)"):
        read_yaml(tmp_path / "a.yaml")


def test_numbers_to_base_60_are_texts(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: 1:30\nb: -2:30.5\nc: 12\nd: 1.5\ne: 0x1f\nf: .inf\n")
    found = read_yaml(file)
    assert found == {"a": "1:30", "b": "-2:30.5", "c": 12, "d": 1.5, "e": 31, "f": float("inf")}
    began = time.process_time()
    file.write_text("a: 1" + ":1" * 120_000)
    assert read_yaml(file)["a"].startswith("1:1")
    file.write_text("a: !!int 1" + ":1" * 120_000)
    with pytest.raises(GraftError, match="a number to base 60"):
        read_yaml(file)
    assert time.process_time() - began < 1
    file.write_text("a: " + "x" * 2**18)
    with pytest.raises(GraftError, match="more than 262,144 bytes"):
        read_yaml(file)


def test_a_small_file_of_json_is_small(tmp_path) -> None:
    file = tmp_path / "a.json"
    file.write_text("{}")
    os.truncate(file, 2**24 + 1)  # takes no room on the disk
    with pytest.raises(GraftError, match="more than 16,777,216 bytes"):
        read_json(file)
    with pytest.raises(GraftError, match="is no valid JSON"):
        read_json(file, LARGE_JSON_BYTES)
