"""What callbacks cost is measured beside the same step without them, and the table says what was measured."""

from __future__ import annotations

import torch

from hf_qlora.bench import callbacks
from hf_qlora.bench.callbacks import CALLBACKS, LOG_EVERY, NONE
from hf_qlora.bench.train_step.arms import Case


def test_all_arms_are_measured_on_the_same_steps() -> None:
    torch.set_num_threads(1)
    found = callbacks.measure(Case("tiny", 1, 8, 2), rounds=4)
    assert list(found["arms"]) == list(CALLBACKS)
    assert all(len(arm["step_s"]) == 4 and min(arm["own_s"]) > 0 for arm in found["arms"].values())
    own = {name: min(arm["own_s"]) for name, arm in found["arms"].items()}
    assert own[NONE] < min(own["AdapterHealthCallback"], own["MemoryCallback"])
    table = callbacks.markdown(found)
    assert table.count("\n| ") == len(CALLBACKS) + 2
    assert f"| {NONE} | " in table


def test_the_table_has_ratios_by_rounds_and_shares_of_the_plain_step() -> None:
    arms = {name: {"step_s": [1.0, 2.0, 4.0], "own_s": [0.0]} for name in CALLBACKS}
    arms["both"] = {"step_s": [1.1, 2.1, 4.1], "own_s": [0.01, 0.02, 0.06]}
    case = {"shape": "tiny", "batch_size": 1, "sequence_length": 8, "rank": 2}
    with_ = dict.fromkeys(
        ("device", "capability", "threads", "torch", "transformers", "peft", "bitsandbytes", "date"), ""
    )
    table = callbacks.markdown({"case": case, "arms": arms, "with": with_})
    assert "| both | 2.100 | 1.0500 | 1.1000 | 20.00 | 1.00% |" in table
    assert f"a log every {LOG_EVERY} steps" in table
