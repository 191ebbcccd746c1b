"""Calibration on a GPU: the same function as on a CPU, and nothing of it left there."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import llama
from calibrating import rows_of, text

from hf_qlora import Calibration, calibration_report, quantize_model
from hf_qlora.quant.calibrate.kept import key_of
from hf_qlora.quant.calibrate.loss import mean_loss


pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_rounds_as_a_cpu_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, rows = llama().to(dtype).eval(), rows_of(text())
    here, there = copy.deepcopy(model), copy.deepcopy(model).cuda()
    quantize_model(here, calibration=rows)
    quantize_model(there, calibration=rows)
    assert all(parameter.is_cuda for parameter in there.parameters())
    ours, theirs = calibration_report(here), calibration_report(there)
    assert ours is not None
    assert theirs is not None
    # One code that falls the other way by a rounding moves those after it: the errors agree, not the codes.
    assert theirs.error == pytest.approx(ours.error, rel=0.1)
    loss, other = mean_loss(here, rows.measured), mean_loss(there, rows.measured)
    assert loss is not None
    assert other == pytest.approx(loss, abs=0.02)


def test_what_a_cpu_rounded_is_another_run() -> None:
    model = llama()
    assert key_of(model, "rows", 1) != key_of(copy.deepcopy(model).cuda(), "rows", 1)


def test_a_gpu_goes_on_where_it_stopped(tmp_path: object) -> None:
    torch.manual_seed(0)
    model, rows = llama().cuda().eval(), rows_of(text())
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    quantize_model(first, calibration=Calibration(rows, resume=str(tmp_path)))
    quantize_model(second, calibration=Calibration(rows, resume=str(tmp_path)))
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), name
