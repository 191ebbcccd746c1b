from __future__ import annotations

from pathlib import Path

import pytest

from hf_qlora.data.errors import DataError
from hf_qlora.data.files import rows_sha256
from hf_qlora.data.labelled import labelled, rows_in


def test_a_class_that_is_a_number_and_a_word_is_an_error() -> None:
    """Two classes would have one name, in the model's config and in the confusion matrix."""
    rows = [{"text": f"{label!r} {number}", "label": label} for label in (1, "1", "2") for number in range(10)]
    with pytest.raises(DataError, match=r"1 is a class as a number in some rows, and as a word in others"):
        labelled(rows)
    assert labelled(row for row in rows if row["label"] != 1).names == ["1", "2"]


@pytest.mark.parametrize("name", ["nothing.jsonl", "./nothing"])
def test_a_file_that_is_not_there_is_said_to_be_so(name: str) -> None:
    with pytest.raises(DataError, match=f"The file {name} is not there"):
        rows_in(name)


def test_a_list_on_each_line_is_said_to_be_json_but_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("[1, 2]\n[3, 4]\n", encoding="utf-8")
    with pytest.raises(DataError, match="begins with a JSON list, and line 2 has more behind it"):
        rows_in(str(file))
    file.write_text("[1, 2]\n", encoding="utf-8")
    assert rows_in(str(file)) == [1, 2]


def test_other_rows_have_another_hash() -> None:
    rows = [("one", 1), ("two", 0)]
    assert rows_sha256(rows) == rows_sha256([list(row) for row in rows])
    assert len({rows_sha256(other) for other in (rows, rows[::-1], rows[:1], [("one", 0), ("two", 0)])}) == 4
