"""Training goes on from a whole checkpoint that fits, or says which one is whole; a full disk harms no older one."""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from dying import dies
from peft import LoraConfig, get_peft_model
from runs import adapters, assert_identical, base, outcome, qlora, rows, trainer
from torch.distributed.fsdp import StateDictType
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_qlora import AdaptiveDepthLoRAConfig, QLoRAConfig
from hf_qlora.trainer import resume
from hf_qlora.trainer.checkpoint import CheckpointError, has_optimizer, last_whole, what_is_wrong


SAVING = {"save_strategy": "steps", "save_steps": 2}  # of 6 steps


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run's folder with three checkpoints, and how it ended."""
    folder = tmp_path_factory.mktemp("run")
    run = trainer(qlora(), folder, **SAVING)
    run.train()
    return folder, outcome(run)


@pytest.fixture
def run_folder(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size * 2 // 3)


def flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return change


DAMAGES = {
    "random numbers gone": (remove("rng_state.pth"), "rng_state.pth is not there"),
    "killed before the state": (
        remove("trainer_state.json"),
        "trainer_state.json, which is written last, is not there",
    ),
    "killed in the state": (cut("trainer_state.json"), "trainer_state.json is cut off"),
    "state of another kind": (lambda f: (f / "trainer_state.json").write_text("[]"), "has no global_step"),
    "optimizer cut": (cut("optimizer.pt"), "optimizer.pt cannot be read"),
    "optimizer changed": (flip("optimizer.pt"), "optimizer.pt is damaged"),
    "optimizer gone": (remove("optimizer.pt"), "optimizer.pt is not there"),
    "scheduler cut": (cut("scheduler.pt"), "scheduler.pt cannot be read"),
    "scheduler gone": (remove("scheduler.pt"), "scheduler.pt is not there"),
    "random numbers cut": (cut("rng_state.pth"), "rng_state.pth cannot be read"),
    "arguments cut": (cut("training_args.bin"), "training_args.bin cannot be read"),
    "adapter changed": (flip("adapter_model.safetensors"), "sha256 differs"),
    "adapter gone": (remove("adapter_model.safetensors"), "adapter_model.safetensors does not exist"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_last_whole_one_named(run_folder: Path, damage: str) -> None:
    """Before anything is loaded: the model is as it was."""
    harm, words = DAMAGES[damage]
    last = run_folder / "checkpoint-6"
    harm(last)
    assert get_last_checkpoint(str(run_folder)) == str(last)  # it goes by the name
    model = qlora()
    before = adapters(model)
    with pytest.raises(CheckpointError) as raised:
        trainer(model, run_folder, **SAVING).train(resume_from_checkpoint=str(last))
    assert words in str(raised.value)
    assert f"before it is {run_folder / 'checkpoint-4'}:" in str(raised.value)
    assert_identical(adapters(model), before)


@pytest.mark.parametrize("damage", ["killed before the state", "optimizer cut", "adapter changed"])
def test_true_goes_on_from_the_last_whole_checkpoint(
    run_folder: Path, finished: tuple[Path, Any], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    harm, words = DAMAGES[damage]
    harm(run_folder / "checkpoint-6")
    run = trainer(qlora(), run_folder, **SAVING)
    run.train(resume_from_checkpoint=True)
    assert_identical(outcome(run), finished[1])
    assert words in caplog.text
    assert "training goes on from checkpoint-4" in caplog.text
    assert what_is_wrong(run_folder / "checkpoint-6") is None  # saved again


def test_where_none_is_whole_it_is_said(run_folder: Path) -> None:
    for folder in run_folder.glob("checkpoint-*"):
        remove("trainer_state.json")(folder)
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole. Of checkpoint-6, trainer_state.json"):
        trainer(qlora(), run_folder).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="There is no whole checkpoint before it"):
        trainer(qlora(), run_folder).train(resume_from_checkpoint=str(run_folder / "checkpoint-6"))


def test_files_of_others_are_left_to_them(run_folder: Path, finished: tuple[Path, Any]) -> None:
    for name in ("ema.pt", "rng_state_of_mine.pth"):
        (run_folder / "checkpoint-4" / name).write_bytes(b"no archive of torch's")
    run = trainer(qlora(), run_folder, **SAVING)
    run.train(resume_from_checkpoint=str(run_folder / "checkpoint-4"))
    assert_identical(outcome(run), finished[1])


def test_each_checkpoint_is_read_once(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(resume, "what_is_wrong", lambda folder: read.append(folder.name) or what_is_wrong(folder))
    cut("optimizer.pt")(run_folder / "checkpoint-6")
    assert resume._choose(run_folder) == run_folder / "checkpoint-4"
    assert read == ["checkpoint-6", "checkpoint-4"]


def test_whole_checkpoints_are_found_by_number(run_folder: Path) -> None:
    shutil.copytree(run_folder / "checkpoint-6", run_folder / "checkpoint-10")
    shutil.copytree(run_folder / "checkpoint-6", run_folder / "checkpoint-100-old")
    assert last_whole(run_folder) == run_folder / "checkpoint-10"
    assert last_whole(run_folder, before=run_folder / "checkpoint-10") == run_folder / "checkpoint-6"
    assert last_whole(run_folder, before=run_folder / "checkpoint-2") is None


def test_a_checkpoint_of_the_model_alone_is_resumed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(qlora(), tmp_path, **SAVING, save_only_model=True).train()
    assert not has_optimizer(tmp_path / "checkpoint-4")
    run = trainer(qlora(), tmp_path)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert run.state.global_step == 6
    assert "saved without the optimizer" in caplog.text


def test_a_finished_run_is_not_trained_on(run_folder: Path, finished: tuple[Path, Any]) -> None:
    """It ends in the middle of an epoch, and was killed after its last save."""
    run = trainer(qlora(), run_folder, **SAVING)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 6
    assert_identical(outcome(run), finished[1])


def test_without_a_checkpoint_trainer_says_so_itself(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer(qlora(), tmp_path / "run").train(resume_from_checkpoint=True)


def test_a_stock_adapter_is_left_to_trainer(tmp_path: Path) -> None:
    """A killed save of a stock adapter is an error of Trainer's own."""
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer(get_peft_model(base(), config), tmp_path, **SAVING).train()
    remove("trainer_state.json")(tmp_path / "checkpoint-6")
    with pytest.raises(FileNotFoundError):
        trainer(get_peft_model(base(), config), tmp_path).train(resume_from_checkpoint=True)


def test_a_run_whose_adapter_would_not_be_saved_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in StateDictType:
        caplog.clear()
        run = trainer(qlora(), tmp_path, max_steps=1)
        plugin = SimpleNamespace(state_dict_type=kind)
        monkeypatch.setattr(run, "accelerator", SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
        assert resume.train(lambda self, resume_from_checkpoint=None: "trained", run) == "trained"
        assert ("writes no adapter" in caplog.text) is (kind is StateDictType.SHARDED_STATE_DICT)


# Another config


def adaptive(**options: Any) -> Any:
    return get_peft_model(
        base(),
        AdaptiveDepthLoRAConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options),
    )


MISFITS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "rank": (lambda: qlora(r=8), {}, "does not fit the model: 28 have another shape"),
    "alpha": (lambda: qlora(lora_alpha=32), {}, "was trained with lora_alpha=8, and this model has lora_alpha=32"),
    "targets": (lambda: qlora(target_modules=["q_proj"]), {}, "24 belong to no adapted layer"),
    "dora": (lambda: qlora(use_dora=True), {}, "tensors are missing"),
    "a dense base": (lambda: qlora_dense(), {}, "quantization"),
    "rslora": (lambda: qlora(use_rslora=True), {}, "use_rslora=False, .* use_rslora=True: .*state .* another scale"),
    "an alpha of its own": (lambda: qlora(alpha_pattern={"q_proj": 3}), {}, "trained with alpha_pattern={}, and"),
    "two scalings": (
        lambda: qlora(lora_alpha=32, use_rslora=True),
        {},
        "with lora_alpha=8, use_rslora=False, and .* lora_alpha=32, use_rslora=True: it would compute something else",
    ),
    "depth": (adaptive, {}, "with depth_profile=None, and this model has depth_profile='linear': .*another scale"),
    "sgd": (qlora, {"optim": "sgd"}, "of another optimizer than SGD"),
    "8 bits": (qlora, {"optim": "adamw_8bit"}, "of another optimizer than AdamW"),
}


def qlora_dense() -> Any:
    config = QLoRAConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", quantization=None)
    return get_peft_model(base(), config)


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_checkpoint_of_another_config_is_refused_before_the_first_step(run_folder: Path, misfit: str) -> None:
    make, options, words = MISFITS[misfit]
    run = trainer(make(), run_folder, **options)
    with pytest.raises(ValueError, match=words):
        run.train(resume_from_checkpoint=str(run_folder / "checkpoint-4"))
    assert run.state.global_step in (0, 4)
    assert not run.state.log_history or run.state.log_history[-1]["step"] <= 4


def test_a_state_in_8_bits_is_refused_by_torchs_optimizer(tmp_path: Path) -> None:
    trainer(qlora(), tmp_path, **SAVING, optim="adamw_8bit").train()
    with pytest.raises(CheckpointError, match="of another optimizer than AdamW, and has"):
        trainer(qlora(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_state_of_other_shapes_is_refused(run_folder: Path) -> None:
    """As torch would take it, and fail in the first step."""
    path = run_folder / "checkpoint-4" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    state["state"][0]["exp_avg"] = torch.zeros(3, 3)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"exp_avg of a .* parameter has the shape \(3, 3\)"):
        trainer(qlora(), run_folder).train(resume_from_checkpoint=str(path.parent))


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}], ids=str)
def test_scalings_that_are_not_folded_must_be_the_same(tmp_path: Path, change: dict[str, Any]) -> None:
    trainer(qlora(portable=False), tmp_path, **SAVING).train()
    with pytest.raises(CheckpointError, match=f"was trained with {next(iter(change))}="):
        trainer(qlora(portable=False, **change), tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gain_bound": 2.0}, "with gain_bound=1.0, and this model has gain_bound=2.0: "),
        (
            {"depth_profile": "rsqrt", "normalize_depth": False},
            "with depth_profile='linear', normalize_depth=True, and",
        ),
        ({"attention": "concentration"}, "with attention='off', and"),
        ({"learn_gain": False}, "optimizer's state in .* does not fit what this model trains"),
    ],
    ids=str,
)
def test_scales_of_depth_must_be_the_same(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    trainer(adaptive(), tmp_path, **{**SAVING, "max_steps": 2}).train()
    with pytest.raises(CheckpointError, match=said):
        trainer(adaptive(**change), tmp_path).train(resume_from_checkpoint=True)


def test_without_an_optimizer_s_state_a_folded_scaling_may_be_another(tmp_path: Path) -> None:
    """lora_B is divided by it, so that the function is the one that was trained."""
    saved = trainer(qlora(), tmp_path, **SAVING, save_only_model=True)
    saved.train()
    resumed = trainer(qlora(use_rslora=True), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    ids = rows()[0]["input_ids"][None]
    with torch.no_grad():
        found, expected = (run.model.eval()(ids).logits for run in (resumed, saved))
    B = [next(p for name, p in run.model.named_parameters() if "lora_B" in name) for run in (resumed, saved)]
    torch.testing.assert_close(2 * B[0], B[1], rtol=2**-23, atol=0)  # α/√r is 4 and α/r is 2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))  # float32 sums


# A full disk


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Let the system refuse what would make a file larger than so many bytes, in the middle of writing it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("file", ["optimizer.pt", "adapter_model.safetensors"])
def test_a_disk_that_is_full_in_the_middle_of_a_save_harms_no_checkpoint(
    tmp_path: Path, file: str, small_files: Callable[[int], None]
) -> None:
    """The larger one is refused at two thirds, with the others written; then there is room again."""
    trainer(qlora(), tmp_path, **SAVING).train()
    before = contents(tmp_path / "checkpoint-2")
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / name)
    run = trainer(qlora(), tmp_path, **SAVING)
    small_files(len(before[file]) * 2 // 3)
    with pytest.raises(OSError, match=r"checkpoint-2 is whole; make room and resume from it") as raised:
        run.train(resume_from_checkpoint=True)
    assert "checkpoint-4 failed" in str(raised.value)
    small_files(resource.RLIM_INFINITY)
    assert contents(tmp_path / "checkpoint-2") == before
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")  # the half-written one is gone
    straight, again = trainer(qlora(), tmp_path / "straight"), trainer(qlora(), tmp_path, **SAVING)
    straight.train()
    again.train(resume_from_checkpoint=True)
    assert_identical(outcome(again), outcome(straight))


@pytest.mark.parametrize("method", ["_save_rng_state", "_save_optimizer_and_scheduler"])
def test_no_space_left_is_said(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Trainer, method, full)
    with pytest.raises(
        OSError, match=r"No space left on device.*is removed. There is none before it; make room"
    ) as raised:
        trainer(qlora(), tmp_path, **SAVING).train()
    assert raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.glob("checkpoint-*"))


def test_another_error_of_a_save_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(Trainer, "_save_rng_state", wrong)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        trainer(qlora(), tmp_path, **SAVING).train()


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
def test_an_error_after_a_whole_save_removes_nothing(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in taking old checkpoints away, or in a push."""

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, "an old checkpoint stays")

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", fails)
    with pytest.raises(OSError, match=r"^\[Errno \d+\] an old checkpoint stays$"):
        trainer(qlora(), tmp_path, **SAVING).train()
    assert what_is_wrong(tmp_path / "checkpoint-2") is None


def test_an_error_in_a_save_that_is_no_full_disk_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(Trainer, "_save_rng_state", denied)
    with pytest.raises(PermissionError, match=r"^\[Errno 13\] denied$"):
        trainer(qlora(), tmp_path, **SAVING).train()


# Saving over a checkpoint


def test_a_save_over_a_checkpoint_is_whole_when_it_is_done_and_not_before(run_folder: Path) -> None:
    """Killed in the middle, the folder holds an optimizer of one run and an adapter of another."""
    for operation in (1, 9, 33):
        place = run_folder.parent / str(operation)
        shutil.copytree(run_folder, place)
        shutil.rmtree(place / "checkpoint-6")

        def save_over(place: Path = place) -> None:
            run = trainer(qlora(), place, **{**SAVING, "max_steps": 4, "learning_rate": 1e-3})
            run.train(resume_from_checkpoint=str(place / "checkpoint-2"))

        before = contents(place / "checkpoint-4")
        came = dies(save_over, place / "checkpoint-4", operation)
        if what_is_wrong(place / "checkpoint-4") is None:
            assert came == (contents(place / "checkpoint-4") == before)
        else:
            assert came
            assert last_whole(place) == place / "checkpoint-2"


def test_nothing_is_said_of_a_run_that_is_well(
    run_folder: Path, caplog: pytest.LogCaptureFixture, finished: tuple[Path, Any]
) -> None:
    with caplog.at_level(logging.WARNING):
        run = trainer(qlora(), run_folder, **SAVING)
        run.train(resume_from_checkpoint=run_folder / "checkpoint-2")
    assert [record for record in caplog.records if record.name.startswith("hf_qlora")] == []
    assert_identical(outcome(run), finished[1])
