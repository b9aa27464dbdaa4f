"""What was encoded before is read again only when it is whole, and of these very rows."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest

from graft.data.config import DataConfig
from graft.data.storage import bulk, cache
from graft.data.storage.bulk import encoded_file
from graft.data.storage.cache import NO_MATTER, entry_key
from graft.errors import GraftError

_OTHERS = {"columns": ("prompt=prompt",), "data_format": "jsonl"}
ROWS = [{"prompt": f"say {n}", "completion": f"{n} " * (n % 7 + 1)} for n in range(30)]


class Told:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        pass


@pytest.fixture
def path(tmp_path, monkeypatch) -> str:
    """A file of a few rows, which is taken for a large one, and a cache of its own."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bulk, "FEW_ROWS", 10)
    monkeypatch.setattr(bulk, "_SMALL_FILE", 0)
    monkeypatch.setattr(bulk, "_LOT_ROWS", 7)
    monkeypatch.setattr(bulk, "cores", lambda: 1)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return str(path)


@pytest.fixture
def encoded(path, tokenizer, monkeypatch):
    """Encode, and say whether that was done or the cache was read, and what was told."""
    work: list[object] = []
    begin = bulk._Work.__init__

    def beginning(self, *arguments) -> None:
        work.append(self)
        begin(self, *arguments)

    monkeypatch.setattr(bulk._Work, "__init__", beginning)

    def encode(path=path, tokenizer=tokenizer, max_length=24, **options):
        work.clear()
        told = Told()
        config = DataConfig(**{"data": path, **options})
        return encoded_file(path, tokenizer, config, max_length, told), bool(work), told.notes

    return encode


def whole(data):
    return [(*vars(one).values(),) for one in data.examples], data.kind, data.ignored_keys


def entry(tmp_path) -> Path:
    (found,) = (tmp_path / "cache" / "encoded").iterdir()
    return found


def test_the_second_time_is_the_first_time(encoded):
    first, worked, _ = encoded()
    again, works, notes = encoded()
    assert (worked, works, notes) == (True, False, [])
    assert whole(again) == whole(first)
    assert again == first


def test_a_file_of_another_name_has_its_own_name_in_each_place(encoded, path, tmp_path):
    encoded()
    other = tmp_path / "other.jsonl"
    os.rename(path, other)
    found, worked, _ = encoded(str(other))
    assert not worked
    assert found.examples[3].where == f"{other}:4"


def test_other_rows_are_encoded_anew(encoded, path):
    encoded()
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    found, worked, _ = encoded()
    assert worked
    assert len(found.examples) == 31


@pytest.mark.parametrize(
    "change",
    [{"separator": " "}, {"eos": False}, {"max_length": 12}, {"stride": 8}],
    ids=lambda change: next(iter(change)),
)
def test_another_option_is_another_entry(encoded, change):
    first, _, _ = encoded()
    found, worked, _ = encoded(**change)
    assert worked
    assert encoded(**change)[1] is False
    assert encoded()[1] is False
    if "stride" not in change:
        assert whole(found) != whole(first)


def test_every_option_counts_that_is_not_known_to_be_none_of_rows(path, tokenizer):
    config = DataConfig(data=path)
    key = entry_key(path, tokenizer, config, 24)
    for one in fields(DataConfig):
        value = getattr(config, one.name)
        new = not value if isinstance(value, bool) else _OTHERS.get(one.name, "other")
        other = replace(config, **{one.name: new})
        same = entry_key(path, tokenizer, other, 24) == key
        # Of the length it is what it was resolved to.
        assert same == (one.name in NO_MATTER | {"max_length"}), one.name
    assert entry_key(path, tokenizer, config, 25) != key


def test_another_tokenizer_or_template_is_another_entry(encoded, build_tokenizer):
    encoded()
    for other in (
        build_tokenizer(merges=[("s", "a")]),
        build_tokenizer(bos=False),
        build_tokenizer(chat_template="{{ messages }}"),
        build_tokenizer(more_special=["<|x|>"]),
    ):
        assert encoded(tokenizer=other)[1]
    assert not encoded(tokenizer=build_tokenizer())[1]


def test_what_day_it_is_counts_where_a_template_may_ask(path, build_tokenizer, monkeypatch):
    class Day:
        @staticmethod
        def today() -> str:
            return "another day"

    keys = []
    templates = ("{{ messages }}", "{{ strftime_now('%d') }}{{ messages }}")
    for template in templates:
        tokenizer = build_tokenizer(chat_template=template)
        keys.append(entry_key(path, tokenizer, DataConfig(data=path), 24))
    monkeypatch.setattr(cache, "date", Day)
    for template, key in zip(templates, keys, strict=True):
        tokenizer = build_tokenizer(chat_template=template)
        same = entry_key(path, tokenizer, DataConfig(data=path), 24) == key
        assert same == ("strftime_now" not in template)


def test_files_that_are_read_together_are_one_entry(encoded, path, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_bytes(Path(path).read_bytes())
    first, _, _ = encoded(str(folder))
    again, worked, _ = encoded(str(folder))
    assert not worked
    assert whole(again) == whole(first)
    assert again.examples[31].where == f"{folder / 'b.jsonl'}:2"
    (folder / "c.jsonl").write_bytes(Path(path).read_bytes())
    found, worked, _ = encoded(str(folder))
    assert worked
    assert len(found.examples) == 90


def test_other_code_is_another_entry(encoded, monkeypatch):
    encoded()
    monkeypatch.setattr(cache, "_code_digest", lambda: "of another version")
    assert encoded()[1]


def test_rows_that_change_while_they_are_read_are_not_kept(path, tokenizer, tmp_path):
    class Changing(Told):
        def progress(self, stage: str, done: int, total: int) -> None:
            Path(path).write_text(json.dumps({"prompt": "other", "completion": "rows"}) + "\n")

    with pytest.raises(GraftError, match=r"rows.jsonl was changed while it was read; begin again"):
        encoded_file(path, tokenizer, DataConfig(data=path), 24, Changing())
    assert not [*(tmp_path / "cache" / "encoded").iterdir()]


def test_all_code_that_makes_examples_counts(monkeypatch):
    read: list[str] = []
    monkeypatch.setattr(cache, "read_bytes", lambda path: read.append(path.name) or b"")
    cache._code_digest.__wrapped__()
    named = {"encode.py", "tokens.py", "examples.py", "chat.py", "turns.py", "json_file.py"}
    assert {*named, "text.py", "rows.py", "bulk.py", "store.py"} <= set(read)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize("name", ["rows.arrow", "about.json"])
@pytest.mark.parametrize(
    "damage", [flip, cut, Path.unlink, lambda file: file.write_bytes(b"")], ids=range(4)
)
def test_a_damaged_entry_is_told_and_made_anew(encoded, tmp_path, name, damage):
    first = whole(encoded()[0])
    damage(entry(tmp_path) / name)
    found, worked, notes = encoded()
    assert worked
    assert whole(found) == first
    assert len(notes) == 1
    assert "encoded anew" in notes[0]
    again, works, later = encoded()
    assert (works, later) == (False, [])
    assert whole(again) == first


def test_what_was_noted_of_rows_is_not_believed_when_it_was_changed(encoded, tmp_path):
    first = whole(encoded()[0])
    about = entry(tmp_path) / "about.json"
    about.write_text(about.read_text().replace('"prompt"', '"text"'))
    found, worked, notes = encoded()
    assert worked
    assert "damaged" in notes[0]
    assert whole(found) == first


def test_an_entry_under_another_name_is_not_believed(encoded, tmp_path):
    encoded()
    old = entry(tmp_path)
    second = whole(encoded(separator=" ")[0])
    (new,) = set((tmp_path / "cache" / "encoded").iterdir()) - {old}
    for name in ("rows.arrow", "about.json"):
        (new / name).write_bytes((old / name).read_bytes())
    found, worked, _ = encoded(separator=" ")
    assert worked
    assert whole(found) == second


def test_an_entry_is_the_users_alone(encoded, tmp_path, monkeypatch):
    first, _, _ = encoded()
    assert entry(tmp_path).stat().st_mode & 0o077 == 0
    entry(tmp_path).chmod(0o777)
    found, worked, notes = encoded()
    assert worked
    assert whole(found) == whole(first)
    assert "others than you could have written it" in notes[0]
    entry(tmp_path).chmod(0o700)
    assert not encoded()[1]
    user = os.geteuid()
    monkeypatch.setattr(cache.os, "geteuid", lambda: user + 1)
    assert encoded()[1]


def test_without_a_cache_nothing_is_kept(encoded, tmp_path):
    encoded(cache=False)
    assert not (tmp_path / "cache" / "encoded").exists()
    encoded()
    assert encoded(cache=False)[1]


@pytest.mark.parametrize("place", ["a file", "full"])
def test_a_cache_that_cannot_be_written_is_done_without(encoded, tmp_path, monkeypatch, place):
    first, _, _ = encoded(cache=False)
    if place == "a file":
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "encoded").write_text("")
    else:
        write = cache.write_batches

        def fill(target, batches) -> None:
            write(target, batches)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cache, "write_batches", fill)
    found, worked, notes = encoded()
    assert worked
    assert whole(found) == whole(first)
    assert len(notes) == 1
    assert "are not kept for another time" in notes[0]
    if place == "full":
        assert list((tmp_path / "cache" / "encoded").iterdir()) == []


def test_no_room_anywhere_is_an_error(encoded, monkeypatch):
    def fill(target, batches) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bulk, "write_batches", fill)
    with pytest.raises(GraftError, match="no room for the encoded rows.*TMPDIR"):
        encoded(cache=False)


def test_two_at_once_make_one_entry(path, tokenizer, tmp_path, monkeypatch):
    both = threading.Barrier(2, timeout=20)
    write = cache.write_batches

    def together(target, batches) -> None:
        write(target, batches)
        both.wait()

    monkeypatch.setattr(cache, "write_batches", together)
    monkeypatch.setattr(bulk, "cores", lambda: 0)
    found = []

    def encode() -> None:
        found.append(encoded_file(path, tokenizer, DataConfig(data=path), 24))

    threads = [threading.Thread(target=encode) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert whole(found[0]) == whole(found[1])
    assert sorted(file.name for file in entry(tmp_path).iterdir()) == ["about.json", "rows.arrow"]


def test_entries_that_were_used_longest_ago_go_first(encoded, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "encoded"
    names = []
    for age, separator in ((900, "a"), (300, "b"), (600, "c")):
        encoded(separator=separator)
        (name,) = {one.name for one in folder.iterdir()}.difference(names)
        names.append(name)
        past = os.stat(folder / name).st_mtime - age
        os.utime(folder / name, (past, past))
    size = sum(file.stat().st_size for file in (folder / names[0]).iterdir())
    assert not encoded(separator="a")[1]  # used now, so the oldest is that of 'c'
    monkeypatch.setattr(cache, "CACHE_BYTES", 3.5 * size)
    encoded(separator="d")
    left = {one.name for one in folder.iterdir()}
    assert len(left) == 3
    assert names[2] not in left
