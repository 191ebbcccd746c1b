"""A run that is killed and resumed, as often as may be, ends as one that nobody has killed: to the bit, on the CPU."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dying import dies, killed
from peft import get_peft_model
from runs import adapters, assert_identical, base, rows
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_qlora import AdaptiveDepthLoRAConfig
from hf_qlora.layers import depth
from hf_qlora.trainer.checkpoint import last_whole


SAVE_EVERY = 2
TIMED = re.compile(r"_(runtime|per_second)$")
KILLS = 10


class InStep(TrainerCallback):
    """Print each step, and wait for a line before going on, as long as there may be one: for whoever kills this."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"step {state.global_step}", flush=True)
        sys.stdin.readline()


def make(folder: Path, steps: int = 6, *callbacks: TrainerCallback) -> Trainer:
    """A run with all that has a state: dropout, gains, attention, a schedule, evaluation, accumulation, rotation."""
    torch.set_num_threads(1)
    set_seed(3)
    config = AdaptiveDepthLoRAConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.1,
        target_modules="all-linear",
        attention="concentration",
        depth_profile="cosine",
        task_type="CAUSAL_LM",
    )
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=SAVE_EVERY,
        save_strategy="steps",
        save_steps=SAVE_EVERY,
        save_total_limit=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = get_peft_model(base(), config)
    return Trainer(model, arguments, train_dataset=rows(12), eval_dataset=rows(4, 8), callbacks=list(callbacks))


def go_on(run: Trainer) -> None:
    """Resume from the last checkpoint; where none is whole yet, begin."""
    folder = Path(run.args.output_dir)
    run.train(resume_from_checkpoint=folder.is_dir() and last_whole(folder) is not None)


def outcome(run: Trainer) -> dict[str, Any]:
    assert run.optimizer is not None
    assert run.lr_scheduler is not None
    last = Path(run.args.output_dir, f"checkpoint-{run.state.global_step}")
    return {
        "adapters": adapters(run.model),
        "depth": depth.learned(run.model, "default"),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.lr_scheduler.state_dict(),
        "random": plain(torch.load(last / "rng_state.pth", weights_only=False)),
        "log": [
            {key: value for key, value in entry.items() if not TIMED.search(key)}
            for entry in run.state.log_history
            if "train_runtime" not in entry
        ],
    }


def plain(value: Any) -> Any:
    """What numpy has, as torch has it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = make(tmp_path_factory.mktemp("straight"))
    run.train()
    found = outcome(run)
    assert [entry["step"] for entry in found["log"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert len({scale["theta"] for scale in found["depth"].values()}) > 1
    assert all(scale["observations"] for scale in found["depth"].values())
    return found


@pytest.mark.parametrize("operation", random.Random(5).sample(range(20, 110), 3))
def test_a_run_killed_in_a_save_ends_as_one_that_was_not(
    tmp_path: Path, operation: int, straight: dict[str, Any]
) -> None:
    """At a file operation in its folder: most are of a save, and some remove what is too old."""
    assert dies(lambda: go_on(make(tmp_path)), tmp_path, operation)
    run = make(tmp_path)
    go_on(run)
    assert_identical(outcome(run), straight)


def test_a_run_killed_twice_at_any_time_ends_as_one_that_was_not(tmp_path: Path, straight: dict[str, Any]) -> None:
    for seconds in (0.9, 0.6):
        killed(lambda: go_on(make(tmp_path)), seconds)
    run = make(tmp_path)
    go_on(run)
    assert_identical(outcome(run), straight)


@pytest.mark.slow
def test_a_run_killed_at_every_file_operation_ends_as_one_that_was_not(
    tmp_path: Path, straight: dict[str, Any]
) -> None:
    operation = 1
    while dies(lambda: go_on(make(tmp_path / str(operation))), tmp_path / str(operation), operation):  # noqa: B023
        run = make(tmp_path / str(operation))
        go_on(run)
        assert_identical(outcome(run), straight)
        operation += 3
    assert operation > 90  # three saves


@pytest.mark.slow
def test_ten_kills_in_a_row(tmp_path: Path) -> None:
    """Processes of their own, each killed at a random time after a random step; as a machine that keeps failing."""
    chance, steps = random.Random(11), 6 * KILLS
    for _ in range(KILLS):
        with start(tmp_path / "cut", steps) as worker:
            assert worker.stdin is not None
            assert worker.stdout is not None
            for _ in range(chance.randint(1, 4)):
                while not worker.stdout.readline().startswith("step"):
                    assert worker.poll() is None, "it ended too soon"
                worker.stdin.write("go on\n")
                worker.stdin.flush()
            time.sleep(chance.uniform(0, 0.15))  # an evaluation, a save, or the next step
            worker.send_signal(signal.SIGKILL)
        assert worker.returncode == -signal.SIGKILL
    for name in ("cut", "straight"):
        worker = start(tmp_path / name, steps)
        shown, _ = worker.communicate()
        assert worker.returncode == 0, shown
    found, expected = (torch.load(tmp_path / f"{name}.outcome", weights_only=False) for name in ("cut", "straight"))
    assert_identical(found, expected)
    state = json.loads((tmp_path / "cut" / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    assert state["global_step"] == steps


def start(folder: Path, steps: int) -> subprocess.Popen[str]:
    """This file, as a program."""
    paths = [str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), str(steps)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    run = make(place, int(sys.argv[2]), InStep())
    go_on(run)
    torch.save(outcome(run), f"{place}.outcome")
