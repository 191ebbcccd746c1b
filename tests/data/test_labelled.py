from __future__ import annotations

import pytest

from hf_qlora.data.errors import DataError
from hf_qlora.data.labelled import labelled


def test_a_class_that_is_a_number_and_a_word_is_an_error() -> None:
    """Two classes would have one name, in the model's config and in the confusion matrix."""
    rows = [{"text": f"{label!r} {number}", "label": label} for label in (1, "1", "2") for number in range(10)]
    with pytest.raises(DataError, match=r"1 is a class as a number in some rows, and as a word in others"):
        labelled(rows)
    assert labelled(row for row in rows if row["label"] != 1).names == ["1", "2"]
