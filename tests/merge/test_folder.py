"""A merged model's folder is there whole or not at all, whatever happens, and what was there is not lost."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from architectures import llama, tokens
from dying import deaths
from merging import logits

from hf_qlora.layers.errors import MergeError
from hf_qlora.merge import folder
from hf_qlora.merge.folder import whole_folder
from hf_qlora.merge.stream import merge_files


OLD = {"config.json": "old", "model.safetensors": "old"}
NEW = {"config.json": "new", "model.safetensors": "new", "tokenizer.json": "new"}


def fill(folder: Path, contents: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(content)


def contents(folder: Path) -> dict[str, str] | None:
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.is_dir() else None


def stopped(target: Path) -> None:
    """A merge that does not come to its end."""
    with whole_folder(target, overwrite=True) as stage:
        fill(stage, NEW)
        raise KeyError("stopped")


@pytest.mark.parametrize("start", [None, {}, OLD], ids=["nothing", "an empty folder", "a model"])
def test_a_folder_is_put_in_place_whole(tmp_path: Path, start: dict[str, str] | None) -> None:
    target = tmp_path / "in" / "merged"
    if start is not None:
        fill(target, start)
    with whole_folder(target, overwrite=True) as stage:
        fill(stage, NEW)
        assert contents(target) == start
    assert contents(target) == NEW
    assert [path.name for path in target.parent.iterdir()] == ["merged"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~mask


@pytest.mark.parametrize("start", [None, OLD], ids=["nothing", "a model"])
def test_an_error_leaves_what_was_there(tmp_path: Path, start: dict[str, str] | None) -> None:
    target = tmp_path / "merged"
    if start is not None:
        fill(target, start)
    with pytest.raises(KeyError, match="stopped"):
        stopped(target)
    assert contents(target) == start
    assert len(list(tmp_path.iterdir())) == (start is not None)


@pytest.mark.parametrize(
    ("start", "overwrite", "message"),
    [
        (OLD, False, "is not empty; name a new folder"),
        ({"thesis.txt": "mine"}, True, "holds other things than one saved model"),
        ({"config.json": "old", "run/log.txt": "mine"}, True, "holds other things than one saved model"),
    ],
    ids=["a model", "no model", "a folder in it"],
)
def test_a_folder_with_other_things_is_refused(
    tmp_path: Path, start: dict[str, str], overwrite: bool, message: str
) -> None:
    for name, content in start.items():
        fill((tmp_path / "merged" / name).parent, {Path(name).name: content})
    with pytest.raises(MergeError, match=message), whole_folder(tmp_path / "merged", overwrite):
        pytest.fail("filled")
    assert all((tmp_path / "merged" / name).read_text() == content for name, content in start.items())


def test_a_folder_below_a_file_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(MergeError, match=re.escape(f"{tmp_path / 'file'} is a file, and no folder")),
        whole_folder(tmp_path / "file" / "new" / "merged", overwrite=True),
    ):
        pytest.fail("filled")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    ["README.md", "script.py", "data.csv", "notes.txt", "optimizer.pt", "extra.safetensors", "results.json", ".env"],
)
def test_a_file_that_is_no_models_keeps_its_folder(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "merged", {**OLD, name: "mine"})
    with (
        pytest.raises(MergeError, match=re.escape(f"one saved model ({name})")),
        whole_folder(tmp_path / "merged", True),
    ):
        pytest.fail("filled")
    assert contents(tmp_path / "merged") == {**OLD, name: "mine"}


def test_what_a_merge_writes_can_be_overwritten(saved: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """Also the base's own text files do not go along, which would then be in the way; and a report is a merge's."""
    base, adapter = saved(target_modules=["q_proj"])
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "chat_template.jinja", "LICENSE.txt"):
        (base / name).write_text("base")
    (base / "notes.txt").write_text("the base's")
    for _ in range(2):
        report = merge_files(str(adapter), tmp_path / "merged", base=str(base), overwrite=True, max_shard_bytes=10**5)
        (tmp_path / "merged" / "report.json").write_text(report.to_json())
    found = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors.index.json", "LICENSE.txt", "spiece.model", "vocab.json"} < found
    assert "notes.txt" not in found


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "merged").write_text("mine")
    with pytest.raises(MergeError, match="is a file"), whole_folder(tmp_path / "merged", overwrite=True):
        pytest.fail("filled")


def test_what_a_killed_process_moved_away_comes_back(tmp_path: Path) -> None:
    fill(tmp_path / ".merged.replaced-abc", OLD)
    with pytest.raises(KeyError, match="stopped"):
        stopped(tmp_path / "merged")
    assert contents(tmp_path / "merged") == OLD


def test_what_a_killed_process_left_is_removed_after_an_hour(tmp_path: Path) -> None:
    now = time.time()
    for name, age in ((".merged.merging-old", 3700), (".merged.merging-new", 3500), (".other.merging-old", 3700)):
        fill(tmp_path / name, NEW)
        os.utime(tmp_path / name, (now - age, now - age))
    with whole_folder(tmp_path / "merged", overwrite=False) as stage:
        fill(stage, NEW)
    assert {path.name for path in tmp_path.iterdir()} == {"merged", ".merged.merging-new", ".other.merging-old"}


@pytest.mark.parametrize("name", ["out[1]", "out*", "a?b"])
def test_a_name_with_wildcards_is_that_folders_alone(tmp_path: Path, name: str) -> None:
    fill(tmp_path / f".{name}.replaced-abc", OLD)
    fill(tmp_path / ".out1.replaced-abc", {"config.json": "of another folder"})
    with pytest.raises(KeyError, match="stopped"):
        stopped(tmp_path / name)
    assert contents(tmp_path / name) == OLD
    assert contents(tmp_path / ".out1.replaced-abc") == {"config.json": "of another folder"}


def test_a_process_between_its_two_renames_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process's second rename comes while this one waits."""
    target, staged = tmp_path / "merged", tmp_path / ".merged.merging-other"
    fill(tmp_path / ".merged.replaced-other", OLD)
    fill(staged, {"config.json": "of the other"})
    monkeypatch.setattr(folder.time, "sleep", lambda seconds: staged.rename(target))
    with pytest.raises(KeyError, match="stopped"):
        stopped(target)
    assert contents(target) == {"config.json": "of the other"}
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_further_chat_templates_are_a_models(tmp_path: Path) -> None:
    fill(tmp_path / "merged", OLD)
    fill(tmp_path / "merged" / "additional_chat_templates", {"tools.jinja": "{{ messages }}"})
    with whole_folder(tmp_path / "merged", overwrite=True) as stage:
        fill(stage, NEW)
    assert contents(tmp_path / "merged") == NEW
    fill(tmp_path / "merged" / "additional_chat_templates", {"thesis.txt": "mine"})
    with pytest.raises(MergeError, match="holds other things"), whole_folder(tmp_path / "merged", overwrite=True):
        pytest.fail("filled")


def test_errors_in_reading_are_not_called_errors_in_saving(tmp_path: Path) -> None:
    for error in (
        OSError("We couldn't connect to the Hub."),
        FileNotFoundError(2, "Not there", str(tmp_path / "base")),
    ):
        with pytest.raises(type(error)) as found, whole_folder(tmp_path / "merged", overwrite=False):
            raise error
        assert found.value is error
    with pytest.raises(OSError, match="Saving the model"), whole_folder(tmp_path / "merged", False) as stage:
        (stage / "no" / "file").write_text("")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, saved: Callable[..., tuple[Path, Path]]) -> None:
    """A real one, as the kernel reports it: no file may grow beyond a limit."""
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    base, adapter = saved(target_modules=["q_proj"])
    target = tmp_path / "merged"
    merge_files(str(adapter), target, base=str(base))
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"Saving the model in .*merged failed: .*What was there is unchanged"):
            merge_files(str(adapter), target, base=str(base), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert not list(tmp_path.glob(".merged*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_killed_leaves_the_old_model_the_new_one_or_nothing(
    tmp_path: Path, saved: Callable[..., tuple[Path, Path]]
) -> None:
    base, adapter = saved(target_modules=["q_proj"])
    (base / "tokenizer_config.json").write_text("{}")
    place, ids = tmp_path / "out", tokens()
    target = place / "merged"
    old = llama()
    results, killed = [], 0

    def merged_over() -> None:
        merge_files(str(adapter), target, base=str(base), overwrite=True, max_shard_bytes=200_000)

    old.save_pretrained(target)
    for number in deaths(merged_over, place):
        killed = number
        if target.exists():  # a mixture would not load, or compute something else
            results.append(logits(tf.AutoModelForCausalLM.from_pretrained(target), ids))
        else:
            old.save_pretrained(target)
    new = logits(tf.AutoModelForCausalLM.from_pretrained(target), ids)
    assert killed >= 20
    assert all(torch.equal(found, logits(old, ids)) or torch.equal(found, new) for found in results)
    assert any(torch.equal(found, logits(old, ids)) for found in results)
