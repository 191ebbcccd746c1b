"""The demo's chats: a data set's rows, or the default task's, in the seed's order; and what is said of bad ones."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from hf_qlora.demo import DemoError, Settings
from hf_qlora.demo.chats import read_chats


def test_a_folder_is_its_files_of_rows(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("prompt,completion\nc,3\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "1"}\n\n{"prompt": "b", "completion": "2"}\n')
    (tmp_path / "a.txt").write_text("no row")
    answers = {chat[0]["content"]: chat[1]["content"] for chat in read_chats(str(tmp_path), seed=0)}
    assert answers == {"a": "1", "b": "2", "c": "3"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"n": 1}\n{"n":', "line 2 is not JSON"),
        ('"a text"', r"rows\.jsonl, line 1: A row must be an object with columns .*, and is 'a text'"),
        ('{"text": "a"}', r"rows\.jsonl, line 1: A row has the columns text; understood are messages or con"),
        (
            '\n{"prompt": "a", "completion": null}',
            r"rows\.jsonl, line 2: A row's chat has no question with",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_the_demos_error(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DemoError, match=says):
        read_chats(str(tmp_path / "rows.jsonl"), seed=0)


def test_a_text_is_no_file_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DemoError, match=r"a\.txt is a text, and rows with columns are needed: \.jsonl"):
        read_chats(str(tmp_path / "a.txt"), seed=0)


def test_without_the_datasets_package_files_alone_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DemoError, match=r"^'me/data' is neither a \.jsonl, \.json, \.csv or \.parquet file nor a folder with some\."
    ):
        read_chats("me/data", seed=0)


def test_other_data_sets_are_left_to_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> None:
        raise FileNotFoundError(f"Dataset {name!r} doesn't exist on the Hub.\nMore about that.")

    own = types.SimpleNamespace(load_dataset=load_dataset, exceptions=types.SimpleNamespace(DatasetsError=OSError))
    monkeypatch.setitem(sys.modules, "datasets", own)
    with pytest.raises(DemoError, match=r"^Cannot load the data set 'me/data': Dataset 'me/data' doesn't exist on"):
        read_chats("me/data", seed=0)


def test_the_seed_sets_the_order(settings: Settings) -> None:
    first, again, other = (read_chats(settings.dataset, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(map(str, first)) == sorted(map(str, other))
