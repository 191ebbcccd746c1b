"""Rows in every layout that is understood, as chats; and what is said of the others."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from hf_qlora.demo import DemoError, Settings, chats
from hf_qlora.demo.chats import as_messages, read_chats, read_rows


CHAT = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two."}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "id": 3},
        {"prompt": "one?", "completion": "two."},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"instruction": "one?", "output": "two."},
        {"instruction": "one?", "input": "", "output": "two."},
    ],
)
def test_all_layouts_mean_the_same_chat(row: dict) -> None:
    assert as_messages(row) == CHAT


def test_an_input_stands_below_its_instruction() -> None:
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    assert as_messages(row)[0]["content"] == "Add.\n\n1 + 1"


def test_unknown_columns_are_named_with_those_understood() -> None:
    message = "has the columns text, label; understood are messages; prompt and completion; or instruction and output"
    with pytest.raises(DemoError, match=message):
        as_messages({"text": "a", "label": 1})


@pytest.mark.parametrize(
    "messages", [[], CHAT[:1], CHAT[1:], "one?", [{"role": "user"}, CHAT[1]], [None, CHAT[1]], None]
)
def test_what_is_no_chat_is_refused(messages: object) -> None:
    with pytest.raises(DemoError, match="ends with the assistant's answer"):
        as_messages({"messages": messages})


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"n": 3}\n')
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n\n{"n": 2}\n')
    (tmp_path / "a.txt").write_text("no JSON")
    assert read_rows(str(tmp_path), seed=0) == [{"n": 1}, {"n": 2}, {"n": 3}]


@pytest.mark.parametrize(
    ("text", "says"), [('{"n": 1}\n{"n":', "line 2 is not JSON"), ("[1]", "line 1 is no JSON object")]
)
def test_a_broken_line_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DemoError, match=rf"rows\.jsonl, {says}"):
        read_rows(str(tmp_path / "rows.jsonl"), seed=0)


class Rows(list):
    """What the demo uses of `datasets.Dataset`."""

    def shuffle(self, seed: int) -> Rows:
        return self

    def select(self, numbers: range) -> Rows:
        return Rows(self[number] for number in numbers)


def test_other_datasets_are_left_to_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> Rows:
        if (name, split) != ("somebody/rows", "train"):
            raise FileNotFoundError(f"Dataset {name!r} doesn't exist on the Hub.\nMore about that.")
        return Rows({"n": n} for n in range(5))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(chats, "MAX_ROWS", 3)
    assert read_rows("somebody/rows", seed=0) == [{"n": 0}, {"n": 1}, {"n": 2}]
    with pytest.raises(
        DemoError, match=r"^Cannot load the data set 'nobody/rows': Dataset 'nobody/rows' doesn't exist on"
    ):
        read_rows("nobody/rows", seed=0)


def test_the_seed_sets_the_order(settings: Settings) -> None:
    first, again, other = (read_chats(settings.dataset, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(map(str, first)) == sorted(map(str, other))
