"""Functions that take a model say so of anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import hf_qlora


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "enable_checkpointing": hf_qlora.enable_checkpointing,
    "disable_checkpointing": hf_qlora.disable_checkpointing,
    "enable_chunked_loss": hf_qlora.enable_chunked_loss,
    "disable_chunked_loss": hf_qlora.disable_chunked_loss,
    "quantize_model": hf_qlora.quantize_model,
    "quantization_report": hf_qlora.quantization_report,
    "fast_generation": lambda model: hf_qlora.fast_generation(model).__enter__(),
    "create_optimizer": lambda model: hf_qlora.create_optimizer(model, lr=1e-3),
    "merge": hf_qlora.merge,
    "plan_memory": lambda model: hf_qlora.plan_memory(model, device="cpu"),
}


@pytest.mark.parametrize("model", ["./nowhere", None, 7])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_no_model_is_refused(name: str, model: Any) -> None:
    with pytest.raises(ValueError, match=r"model=|\./nowhere|no adapter|not a PEFT model"):
        FUNCTIONS[name](model)
