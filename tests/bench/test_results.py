from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hf_qlora.bench.results import append_line, read_lines, read_whole, sealed, write_whole
from hf_qlora.cli import app


COMMITTED = sorted((Path(__file__).parents[2] / "results").rglob("*.json*"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_results_are_as_they_were_measured(path: Path) -> None:
    assert read_lines(path) if path.suffix == ".jsonl" else read_whole(path)


@given(st.dictionaries(st.text().filter(lambda key: key != "sha256"), VALUES, max_size=4))
def test_a_seal_fits_what_a_reader_gets_back(values: dict[str, object]) -> None:
    again = json.loads(json.dumps(sealed(values)))
    assert sealed(again) == again
    assert sealed({**values, "new": 1}) != sealed({**values, "new": 2})


def test_results_load_back(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", {"pair": (1, 2), 3: 0.1})
    assert read_whole(tmp_path / "a.json") == {"pair": [1, 2], "3": 0.1}
    for number in range(2):
        append_line(tmp_path / "b.jsonl", {"number": number})
    assert read_lines(tmp_path / "b.jsonl") == [{"number": 0}, {"number": 1}]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_a_line_that_was_cut_off_is_written_anew(tmp_path: Path) -> None:
    results = tmp_path / "a.jsonl"
    append_line(results, {"number": 0})
    with results.open("a") as file:
        file.write('{"number": 1, "sha')
    append_line(results, {"number": 2})
    assert read_lines(results) == [{"number": 0}, {"number": 2}]


def test_a_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    """As editors leave it that strip a file's last newline."""
    results = tmp_path / "a.jsonl"
    for number in range(2):
        append_line(results, {"number": number})
    results.write_text(results.read_text().rstrip("\n"))
    assert read_lines(results) == [{"number": 0}, {"number": 1}]
    append_line(results, {"number": 2})
    assert read_lines(results) == [{"number": 0}, {"number": 1}, {"number": 2}]
    results.write_text(results.read_text().rstrip("\n").replace('number": 2', 'number": 3'))
    with pytest.raises(ValueError, match="was changed"):
        read_lines(results)


@pytest.mark.parametrize(
    ("order", "line"),
    [((0, 1, 3), 3), ((1, 2, 3), 1), ((0, 2, 1, 3), 2), ((0, 1, 1, 2, 3), 3), ((0, 1, 2, 3, 0), 5)],
    ids=["deleted", "first deleted", "moved", "doubled", "put at the end"],
)
def test_lines_are_those_they_were_written_behind(order: tuple[int, ...], line: int, tmp_path: Path) -> None:
    results = tmp_path / "a.jsonl"
    for number in range(4):
        append_line(results, {"number": number})
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[i] for i in order))
    with pytest.raises(ValueError, match=rf"a\.jsonl, line {line} .*taken out, put in or moved"):
        read_lines(results)


def test_a_line_sealed_alone_is_found_between_others(tmp_path: Path) -> None:
    results = tmp_path / "a.jsonl"
    append_line(results, {"number": 0})
    with results.open("a") as file:
        file.write(json.dumps(sealed({"number": 1})) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_lines(results)


def test_processes_append_in_turn(tmp_path: Path) -> None:
    results, count = tmp_path / "a.jsonl", 8
    with ThreadPoolExecutor(count) as pool:  # each opens the file and the lock for itself, as processes do
        list(pool.map(lambda number: append_line(results, {"number": number}), range(count)))
    assert sorted(row["number"] for row in read_lines(results)) == list(range(count))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("0.25", "0.52"), "was changed after it was measured"),
        (('"sha256"', '"sha"'), "has no 'sha256'"),
        (("{", "["), "is not JSON"),
    ],
)
def test_what_was_changed_by_hand_is_found(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    whole, lines = tmp_path / "a.json", tmp_path / "b.jsonl"
    write_whole(whole, {"step_s": [0.25]})
    append_line(lines, {"step_s": [0.125]})
    append_line(lines, {"step_s": [0.25]})
    for path in (whole, lines):
        path.write_text(path.read_text().replace(*change))
    with pytest.raises(ValueError, match=rf"a\.json {said}"):
        read_whole(whole)
    with pytest.raises(ValueError, match=rf"b\.jsonl, line \d {said}"):
        read_lines(lines)


def test_a_command_says_so_in_one_sentence(tmp_path: Path) -> None:
    whole, lines = tmp_path / "a.json", tmp_path / "b.jsonl"
    write_whole(whole, {"arms": 1})
    append_line(lines, {"arms": 1})
    for path, command in ((whole, "train-step"), (lines, "calibrated-nf4")):
        path.write_text(path.read_text().replace("1", "2", 1))
        found = CliRunner().invoke(app, ["bench", command, "--report", "--results", str(path)])
        assert found.exit_code == 2
        assert "was changed after it was measured" in found.output.replace("\n", " ")
