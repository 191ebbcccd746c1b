"""Documents out of files, folders and data sets; and what is said of others."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict

from hf_qlora.data import files
from hf_qlora.data.documents import document_of, read_documents
from hf_qlora.data.errors import DataError
from hf_qlora.data.labelled import rows_in


CHAT = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two."}]
ROWS = [{"text": "a"}, {"text": "b"}]


def lines(rows: list[Any]) -> str:
    return "\n".join(map(json.dumps, rows))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\ntwo\n", ["one\n\ntwo\n"]),
        ("a.jsonl", lines(ROWS), ["a", "b"]),
        ("a.json", lines(ROWS), ["a", "b"]),
        ("a.json", json.dumps(ROWS), ["a", "b"]),
        ("a.json", json.dumps(["a", "b"]), ["a", "b"]),
        ("a.jsonl", lines(["a", "b"]), ["a", "b"]),
        ("a.jsonl", lines([{"conversations": [{"from": "human", "value": "one?"}, CHAT[1]]}]), [CHAT]),
        ("a.jsonl", lines([{"prompt": "one?", "completion": "two."}]), [CHAT]),
        ("a.jsonl", lines([{"text": "a", "prompt": "one?", "completion": "two."}]), ["a"]),
        ("a.jsonl", lines([{"input_ids": [3, 4], "labels": [3, 4]}]), [[3, 4]]),
        ("a.jsonl", '{"text": "a"}\n{"text": null}', ["a", ""]),
        ("a.csv", "text,n\na,1\n,2\n", ["a", ""]),
        ("a.jsonl", lines([{"text": None, "messages": CHAT}, {"text": "a", "messages": None}]), [CHAT, "a"]),
        ("a.jsonl", lines([{"text": None, "input_ids": [3, 4], "attention_mask": None}]), [[3, 4]]),
        ("a.jsonl", lines([{"text": "", "messages": CHAT}, {"text": float("nan")}, None]), [CHAT, "", ""]),
        ("a.jsonl", lines([{"input_ids": None, "attention_mask": None, "n": 3}]), [""]),
        ("a.jsonl", lines([{"text": None, "messages": None, "prompt": "one?", "completion": "two."}]), [CHAT]),
        ("a.jsonl", lines([{"input_ids": [0, 3, 0, 4], "attention_mask": [0, 1, 1, 1]}]), [[3, 0, 4]]),
        ("a.jsonl", lines([{"input_ids": [3, 4, 0], "attention_mask": [True, True, False]}]), [[3, 4]]),
    ],
)
def test_a_file_is_its_documents(tmp_path: Path, name: str, content: str, expected: list[Any]) -> None:
    (tmp_path / name).write_text(content)
    assert read_documents(str(tmp_path / name)) == (expected, name)


def test_a_chat_without_an_answer_is_refused_with_its_place_or_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for rows, found in (([{"messages": CHAT[:1]}], [CHAT[:1]]), ([{"messages": None}], [[]])):
        file.write_text("\n" + lines(rows))
        assert read_documents(str(file), answered=False)[0] == found
        with pytest.raises(DataError, match=r"a\.jsonl, line 2: A row's chat has no question with the assistant's"):
            read_documents(str(file))


def test_a_column_is_named_behind_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines([{"text": "no", "body": "yes", "said": CHAT}]))
    assert read_documents(f"{file}#body")[0] == ["yes"]
    assert document_of({"text": "no", "body": None}, "body") == ""
    assert read_documents(f"{file}#said")[0] == [CHAT]
    (tmp_path / "c#.txt").write_text("a file of that name")
    assert read_documents(str(tmp_path / "c#.txt"))[0] == ["a file of that name"]


def test_endings_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_text("a")
    (tmp_path / "b.JsonL").write_text(lines(ROWS[:1]))
    assert read_documents(str(tmp_path))[0] == ["a", "a"]
    assert read_documents(str(tmp_path / "A.TXT"))[0] == ["a"]
    with pytest.raises(DataError, match="is not there"):
        read_documents("B.JSONL")


@pytest.mark.parametrize(("file", "what"), [("config.json", "a model's"), ("adapter_config.json", "an adapter's")])
def test_a_folder_that_is_not_of_data_is_named(tmp_path: Path, file: str, what: str) -> None:
    (tmp_path / file).write_text("{}")
    for read in (read_documents, rows_in):
        with pytest.raises(DataError, match=re.escape(f"{tmp_path} is {what}, and not of data (by {file}).")):
            read(str(tmp_path))


def test_what_datasets_saved_is_named(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": "a"}])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows).save_to_disk(tmp_path / "parts")
    for folder, what in (("one", r"returns \(by"), ("parts", r"returns, one part of it \(by")):
        with pytest.raises(DataError, match=rf"is what save_to_disk writes.* datasets\.load_from_disk {what}"):
            read_documents(str(tmp_path / folder))
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "state.json").write_text(lines(ROWS))
    assert read_documents(str(tmp_path / "states"))[0] == ["a", "b"]


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.jsonl").write_text(lines(ROWS[:1]))
    (tmp_path / "README.md").write_text("not read")
    assert read_documents(str(tmp_path)) == (["a", "b"], tmp_path.name)


@pytest.mark.parametrize(
    ("name", "content", "source", "message"),
    [
        (
            "a.jsonl",
            lines([{"input_ids": [3, 4], "attention_mask": [1]}]),
            "{}/a.jsonl",
            "{}/a.jsonl, line 1: The column 'attention_mask' has not a 0 or 1 for each of input_ids, but [1]",
        ),
        ("a.txt", "", "{}/b.txt", "The file {}/b.txt is not there."),
        (
            "a.tsv",
            "",
            "{}/a.tsv",
            "{}/a.tsv is not read; name a file that ends in .txt, .jsonl, .json, .csv, .parquet",
        ),
        ("a.tsv", "", "{}", "The folder {} has no files that end in .txt"),
        ("a.jsonl", '{"text": "a"}\n{"te', "{}/a.jsonl", "{}/a.jsonl, line 2 is not JSON"),
        ("a.json", '[{"text": "a"},\n{"te', "{}/a.json", "{}/a.json, line 2 is not JSON"),
        ("a.json", '[{"text": ' + 5_000 * "1" + "}]", "{}/a.json", "{}/a.json is not JSON that can be read"),
        ("a.jsonl", '{"text": ' + 100_000 * "[", "{}/a.jsonl", "{}/a.jsonl, line 1 is not JSON that can be read"),
        ("a.jsonl", "3", "{}/a.jsonl", "{}/a.jsonl, line 1 is no JSON object or string, but 3"),
        (
            "a.json",
            "[3]",
            "{}/a.json",
            "{}/a.json, element 1: A row is neither a text nor an object with columns, but 3",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"a": 1, "b": 2}',
            "{}/a.jsonl",
            "{}/a.jsonl, line 3: A row has the columns a, b; understood are text; messages",
        ),
        ("a.jsonl", '{"a": 1, "b": 2}', "{}/a.jsonl", "; or input_ids; or name another, as {}/a.jsonl#a."),
        ("a.jsonl", "{}", "{}/a.jsonl", "has the columns none; understood are text"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": 3}',
            "{}/a.jsonl",
            "{}/a.jsonl, line 2: The column 'text' has no text",
        ),
        ("a.jsonl", '{"a": 1, "b": 2}', "{}/a.jsonl#text", "There is no column 'text'; found are a, b."),
        ("a.jsonl", '{"a": 1, "b": 2}', "{}/a.jsonl#a", "The column 'a' has no text, chat or token ids, but 1"),
        ("a.txt", "", "A text.\nAnd more.", "'A text. And more.' is a text and no name of a file"),
        ("a.txt", "", "A text.", "'A text.' is a text and no name of a file or data set; give a list of texts, or"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, source: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(message.replace("{}", str(tmp_path)))):
        read_documents(source.replace("{}", str(tmp_path)))


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a\.txt cannot be read as text in UTF-8"):
        read_documents(str(tmp_path / "a.txt"))


def test_only_a_newline_ends_a_line_of_json(tmp_path: Path) -> None:
    """Other characters that Python ends lines at may stand in a string as they are; web text has them."""
    texts = ["one\u2028two", "three\u2029", "\x85four"]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(rows).encode())
    assert read_documents(str(tmp_path / "a.jsonl"))[0] == texts


@pytest.mark.parametrize("content", [lines(ROWS), json.dumps(ROWS)])
def test_the_mark_of_windows_editors_is_no_text(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8-sig")
    assert read_documents(str(tmp_path / "a.json"))[0] == ["a", "b"]
    (tmp_path / "a.txt").write_text("one", encoding="utf-8-sig")
    assert read_documents(str(tmp_path / "a.txt"))[0] == ["one"]


class Rows(list[Any]):
    """What is used of `datasets.Dataset`."""

    def select(self, numbers: list[int]) -> Rows:
        return Rows(self[number] for number in numbers)


def test_data_sets_are_left_to_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class DatasetsError(Exception):
        """The base of those of the package, which is no OSError or ValueError."""

    def load_dataset(name: str, *config: str, split: str) -> Rows:
        asked.append((name, *config, split))
        if name == "me/script":
            raise RuntimeError("Dataset scripts are no longer supported, but found script.py")
        if name == "me/several":
            if config:
                return Rows([{"text": config[0]}])
            listed = "Please pick one among the available configs: ['de', 'en']"
            raise ValueError(f"Config name is missing.\n{listed}\nExample of usage:\n")
        if name == "me/mixed":
            raise DatasetsError("An error occurred while generating the dataset") from TypeError("columns differ\n")
        if name != "me/data":
            raise FileNotFoundError(f"Dataset {name!r} doesn't exist on the Hub.\nMore about that.")
        return Rows({"text": f"{n}", "body": f"b{n}"} for n in range(5))

    exceptions = types.SimpleNamespace(DatasetsError=DatasetsError)
    own = types.SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions)
    monkeypatch.setitem(sys.modules, "datasets", own)
    found, name = read_documents("me/data")
    assert (sorted(found), name) == ([f"{n}" for n in range(5)], "me/data")
    assert read_documents("me/data")[0] == found
    assert {str(read_documents("me/data", seed)[0]) for seed in range(5)} > {str(found)}
    assert sorted(read_documents("me/data:test#body")[0]) == [f"b{n}" for n in range(5)]
    with pytest.raises(DataError, match=r"^me/data, row [0-4] \(from 0\): There is no column 'other'"):
        read_documents("me/data#other")
    assert set(asked) == {("me/data", "train"), ("me/data", "test")}
    with pytest.raises(DataError, match=r"^Cannot load the data set 'me/none': Dataset 'me/none' doesn't exist on"):
        read_documents("me/none")
    with pytest.raises(DataError, match=r"^Cannot load the data set 'me/mixed': An error .* dataset: columns differ"):
        read_documents("me/mixed")
    assert read_documents("me/several/en:test") == (["en"], "me/several/en:test")
    assert asked[-1] == ("me/several", "en", "test")
    configs = r"name is missing\. Name one behind it, as me/several/CONFIG; there are \['de', 'en'\]\."
    with pytest.raises(DataError, match=rf"^Cannot load the data set 'me/several': Config {configs}"):
        read_documents("me/several")
    with pytest.raises(DataError, match=r"^Cannot load the data set 'me/script': Dataset scripts are no longer"):
        read_documents("me/script")
    drawn = files.placed_hub_rows("me/data", "train", 0, "", limit=3)
    assert len(drawn) == 3
    assert all(place == f"row {row['text']} (from 0)" for place, row in drawn)


def test_without_the_datasets_package_the_pip_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"^'me/data' is neither a \.txt, .*, \.csv or \.parquet file .* pip install datasets"
    ):
        read_documents("me/data")


def test_a_word_that_is_no_data_set_may_have_been_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"^'hello' is no file here; if it is meant as a text, give a list of texts, or"
    ):
        read_documents("hello")


def test_token_ids_of_any_kind_are_a_document() -> None:
    assert document_of({"input_ids": torch.tensor([1, 2])}) == document_of({"input_ids": (1, 2)}) == [1, 2]
    with pytest.raises(DataError, match="has no text, chat or token ids"):
        document_of({"input_ids": [0.5]})
