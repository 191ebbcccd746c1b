"""Rows of CSV and of Parquet, wherever rows are read."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from hf_qlora.data.documents import read_documents
from hf_qlora.data.errors import DataError
from hf_qlora.data.labelled import labelled, rows_in


CHAT = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two."}]
TEXTS = [
    "plain",
    'with, commas and "quotes"',
    "of two\nlines",
    "a\r\nb\rc",
    "ünïcode \u2028 in one line",
    "long " * 50_000,
]


@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".parquet"])
def test_a_table_is_its_rows(tmp_path: Path, suffix: str) -> None:
    """Written by `datasets`."""
    file, rows = tmp_path / f"a{suffix}", Dataset.from_list([{"text": text, "label": "x"} for text in TEXTS])
    rows.to_parquet(file) if suffix == ".parquet" else rows.to_csv(file)  # CSV by pandas
    assert read_documents(str(file)) == (TEXTS, file.name)
    assert read_documents(f"{file}#label")[0] == ["x"] * len(TEXTS)
    assert rows_in(str(file)) == rows_in(str(tmp_path)) == rows.to_list()


def test_chats_and_token_ids_of_parquet(tmp_path: Path) -> None:
    Dataset.from_list([{"messages": CHAT}]).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list([{"input_ids": [3, 4]}]).to_parquet(tmp_path / "b.parquet")
    assert read_documents(str(tmp_path))[0] == [CHAT, [3, 4]]


def test_a_column_of_parquet_may_have_any_name(tmp_path: Path) -> None:
    Dataset.from_list([{"a;b": "one"}]).to_parquet(tmp_path / "a.parquet")
    assert read_documents(f"{tmp_path / 'a.parquet'}#a;b")[0] == ["one"]


def test_chats_of_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction,input,output\none?,,two.\n\n")
    assert read_documents(str(tmp_path / "a.csv"))[0] == [CHAT]


def test_csv_as_windows_writes_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\r\none,1\r\n")
    assert rows_in(str(tmp_path / "a.csv")) == [{"text": "one", "label": "1"}]


def test_the_numbers_that_pandas_writes_are_no_column(tmp_path: Path) -> None:
    pandas.DataFrame({"text": ["a", "b"]}).to_csv(tmp_path / "a.csv")
    assert rows_in(str(tmp_path / "a.csv")) == [{"text": "a"}, {"text": "b"}]


def test_classes_are_in_one_order_in_all_files(tmp_path: Path) -> None:
    """Numbers in theirs; as words in CSV, and with fractions where pandas has had a gap."""
    rows = pandas.DataFrame({"text": [f"text {i}" for i in range(132)], "label": [float(i % 12) for i in range(132)]})
    rows.to_parquet(tmp_path / "a.parquet")
    rows.astype({"label": int}).to_csv(tmp_path / "a.csv", index=False)
    rows.astype({"label": int}).to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    for name in ("a.parquet", "a.csv", "a.jsonl"):
        assert labelled(rows_in(str(tmp_path / name))).names == [str(i) for i in range(12)], name


def test_an_empty_cell_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\none,\n")
    with pytest.raises(DataError, match="Row 1 has nothing in the column 'label'; its columns are text, label"):
        labelled(rows_in(str(tmp_path / "a.csv")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", " must name each of its columns once, and names (nothing)"),
        ("text,text\na,b\n", " must name each of its columns once, and names text, text"),
        ("text,\na,b\n", " must name each of its columns once, and names text,"),
        ("text;label\na,b;1\n", " has semicolons between its cells; write it with commas."),
        ("text\tlabel\na\t1\n", " has tabs between its cells; write it with commas."),
        ('\ntext,label\n"a\nb",1\nc\n', ", line 5 has 1 cell, and there are names of 2."),
        ("text\na,b\n", ", line 2 has 2 cells, and there are names of 1."),
        ('text\n"a\n', ", line 2 is not CSV: unexpected end of data."),
    ],
)
def test_what_is_no_table_is_said_with_its_place(tmp_path: Path, content: str, message: str) -> None:
    file, limit = tmp_path / "a.csv", csv.field_size_limit()
    file.write_text(content)
    for read in (read_documents, rows_in):
        with pytest.raises(DataError, match=re.escape(f"{file}{message}")):
            read(str(file))
    assert csv.field_size_limit() == limit


def test_parquet_that_cannot_be_read_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    Dataset.from_list([{"text": "a"}, {"text": None}]).to_parquet(file)
    assert read_documents(str(file))[0] == ["a", ""]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=re.escape(f"{file}: to read Parquet, pip install pyarrow")):
        read_documents(str(file))
    monkeypatch.undo()
    table = pyarrow.table({"text": pyarrow.array([b"hello"], pyarrow.binary())})
    pyarrow.parquet.write_table(table, file)
    with pytest.raises(DataError, match=re.escape(f"{file}, row 1: The column 'text' has no text, chat or token ids")):
        read_documents(str(file))
    late = pyarrow.table({"text": ["a"], "at": pyarrow.array([10**12], pyarrow.timestamp("s"))})
    pyarrow.parquet.write_table(late, file)
    with pytest.raises(DataError, match=re.escape(f"{file} cannot be read as Parquet: ")):
        read_documents(str(file))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, file)
    with pytest.raises(DataError, match="must name each of its columns once, and names text, text"):
        read_documents(str(file))
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=re.escape(f"{file} cannot be read as Parquet: ")):
        read_documents(str(file))


def test_folders_that_are_called_like_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").mkdir()
    (tmp_path / "b.csv").write_text("text\na\n")
    assert read_documents(str(tmp_path))[0] == ["a"]
