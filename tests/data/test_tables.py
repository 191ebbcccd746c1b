"""Rows of CSV and of Parquet, wherever rows are read."""

from __future__ import annotations

import csv
import datetime
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_qlora.data.documents import read_documents
from hf_qlora.data.errors import DataError
from hf_qlora.data.files import rows_sha256
from hf_qlora.data.labelled import labelled, rows_in


CHAT = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two."}]
TEXTS = ["plain", 'with, commas and "quotes"', "of two\nlines", "ünïcode \u2028 in one line", "long " * 50_000]


@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".parquet"])
def test_a_table_is_its_rows(tmp_path: Path, suffix: str) -> None:
    """Written by `datasets`."""
    file, rows = tmp_path / f"a{suffix}", Dataset.from_list([{"text": text, "label": "x"} for text in TEXTS])
    rows.to_parquet(file) if suffix == ".parquet" else rows.to_csv(file)
    assert read_documents(str(file)) == (TEXTS, file.name)
    assert read_documents(f"{file}#label")[0] == ["x"] * len(TEXTS)
    assert rows_in(str(file)) == rows_in(str(tmp_path)) == rows.to_list()


def test_chats_and_token_ids_of_parquet(tmp_path: Path) -> None:
    Dataset.from_list([{"messages": CHAT}]).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list([{"input_ids": [3, 4]}]).to_parquet(tmp_path / "b.parquet")
    assert read_documents(str(tmp_path))[0] == [CHAT, [3, 4]]


def test_chats_of_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction,input,output\none?,,two.\n\n")
    assert read_documents(str(tmp_path / "a.csv"))[0] == [CHAT]


def test_csv_as_windows_writes_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\r\none,1\r\n")
    assert rows_in(str(tmp_path / "a.csv")) == [{"text": "one", "label": "1"}]


def test_classes_of_csv(tmp_path: Path) -> None:
    lines = ["text,label", *(f"text {i},{i % 2}" for i in range(30))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert labelled(rows_in(str(tmp_path / "a.csv"))).names == ["0", "1"]


def test_an_empty_cell_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\none,\n")
    with pytest.raises(DataError, match="Row 1 has nothing in the column 'label'; its columns are text, label"):
        labelled(rows_in(str(tmp_path / "a.csv")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1 must name each column once, and is (nothing)"),
        ("text,text\na,b\n", "line 1 must name each column once, and is text,text"),
        ("text,\na,b\n", "line 1 must name each column once, and is text,"),
        ('text,label\n"a\nb",1\nc\n', "line 4 has 1 cells, and line 1 names 2 columns."),
        ("text\na,b\n", "line 2 has 2 cells, and line 1 names 1 columns."),
        ('text\n"a\n', "line 2 is not CSV: unexpected end of data."),
    ],
)
def test_what_is_no_table_is_said_with_its_place(tmp_path: Path, content: str, message: str) -> None:
    file, limit = tmp_path / "a.csv", csv.field_size_limit()
    file.write_text(content)
    for read in (read_documents, rows_in):
        with pytest.raises(DataError, match=re.escape(f"{file}, {message}")):
            read(str(file))
    assert csv.field_size_limit() == limit


def test_parquet_that_cannot_be_read_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    Dataset.from_list([{"text": "a"}, {"text": None}]).to_parquet(file)
    with pytest.raises(DataError, match=re.escape(f"{file}, row 2: The column 'text' has no text")):
        read_documents(str(file))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=re.escape(f"{file}: to read Parquet, pip install pyarrow")):
        read_documents(str(file))
    monkeypatch.undo()
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=re.escape(f"{file} cannot be read as Parquet: ")):
        read_documents(str(file))


def test_rows_of_types_that_json_has_not_are_known_by_their_hash(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "on": datetime.date(2026, 1, day)} for day in (1, 2)]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    read = rows_in(str(tmp_path / "a.parquet"))
    assert read == rows
    assert rows_sha256(read[:1]) != rows_sha256(read[1:])
