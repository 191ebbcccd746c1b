"""Optimizers train our adapters on the CPU and resume to the bit, or say before training that they cannot."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from runs import HALF, StopAndSave, adapters, assert_identical, base, log, outcome, rows, trainer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

from hf_qlora import AdaptiveDepthLoRAConfig, NF4Config, QLoRAConfig
from hf_qlora.kernels.functional import Adapter, lora_linear
from hf_qlora.validation import ConfigError


RANK, ALPHA = 40, 80  # 40 × 128 weights are enough for bitsandbytes to keep a state in 8 bits


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


MODELS: dict[str, tuple[type[QLoRAConfig], dict[str, Any]]] = {
    "nf4": (QLoRAConfig, {"quantization": NF4Config()}),
    "dense": (QLoRAConfig, {"quantization": None}),
    "gains": (AdaptiveDepthLoRAConfig, {}),
    "biases": (QLoRAConfig, {"lora_bias": True}),
}


def make(kind: str, **changes: Any) -> Any:
    cls, options = MODELS[kind]
    settings = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.1, "target_modules": "all-linear"}
    return get_peft_model(base(), cls(**{**settings, "task_type": "CAUSAL_LM", **options, **changes}))


# Trainer(optim=…)


@pytest.mark.parametrize(
    ("optim", "kind"),
    [
        ("adamw_torch_fused", "gains"),
        ("adamw_8bit", "nf4"),
        ("adamw_8bit", "dense"),
        ("adamw_8bit", "gains"),
        ("paged_adamw_8bit", "biases"),
    ],
)
def test_trainers_optimizers_resume_to_the_bit(tmp_path: Path, optim: str, kind: str) -> None:
    straight = trainer(make(kind), tmp_path / "straight", optim=optim)
    before = adapters(straight.model)
    straight.train()
    trainer(make(kind), tmp_path / "cut", StopAndSave(), optim=optim).train()
    resumed = trainer(make(kind), tmp_path / "cut", optim=optim)
    resumed.train(resume_from_checkpoint=True)
    assert_identical(outcome(resumed), outcome(straight))
    assert all(not torch.equal(p, before[name]) for name, p in adapters(resumed.model).items())
    states = resumed.optimizer.state.values()
    dtypes = {value.dtype for state in states for key, value in state.items() if key in ("state1", "exp_avg")}
    assert dtypes == ({torch.float32} if "torch" in optim else {torch.uint8} | dtypes)


def test_a_paged_optimizer_on_the_cpu_is_said_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(make("nf4"), tmp_path, optim="paged_adamw_8bit", max_steps=1)
    with caplog.at_level(logging.WARNING, "hf_qlora"):
        run.train()
    assert (
        "optim='paged_adamw_8bit' pages only between a GPU and its host; on the CPU it is 'adamw_8bit'" in caplog.text
    )


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_an_optimizer_without_kernels_is_refused_before_training(
    tmp_path: Path, optim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an older bitsandbytes has none for CPUs."""
    for cls in (bnb.optim.optimizer.Optimizer1State, bnb.optim.optimizer.Optimizer2State):
        monkeypatch.setattr(cls, "update_step", lambda *args: (_ for _ in ()).throw(NotImplementedError("no kernel")))
    run = trainer(make("nf4"), tmp_path, optim=optim)
    with pytest.raises(ConfigError, match=rf"optim='{optim}' cannot step on cpu.*no kernel.*adamw_torch_fused"):
        run.train()
    assert run.optimizer is None
    assert run.state.global_step == 0


def test_memory_that_is_short_is_not_taken_for_kernels_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*args: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(bnb.optim.optimizer.Optimizer2State, "update_step", short)
    with pytest.raises(torch.OutOfMemoryError, match=r"^out of memory$"):
        trainer(make("nf4"), tmp_path, optim="adamw_8bit").train()


def test_a_model_that_is_frozen_is_refused(tmp_path: Path) -> None:
    model = make("nf4")
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="is_trainable=True"):
        trainer(model, tmp_path, optim="adamw_8bit").train()


# PEFT's optimizers


def lorafa(model: Any) -> Any:
    return create_lorafa_optimizer(model, r=RANK, lora_alpha=ALPHA, lr=1e-2, weight_decay=0.1)


def loraplus(model: Any) -> Any:
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)


def loraplus_8bit(model: Any) -> Any:
    return create_loraplus_optimizer(model, bnb.optim.AdamW8bit, lr=1e-3, loraplus_lr_ratio=8.0)


def run_with(model: Any, make_optimizer: Callable[[Any], Any], folder: Path, *callbacks: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=2 * HALF,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    optimizers = (make_optimizer(model), None)
    return Trainer(model, arguments, train_dataset=rows(), callbacks=list(callbacks), optimizers=optimizers)


@pytest.mark.parametrize(
    ("make_optimizer", "kind"),
    [*((lorafa, kind) for kind in MODELS), (loraplus, "gains"), (loraplus, "dense"), (loraplus_8bit, "gains")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_pefts_optimizers_resume_to_the_bit(tmp_path: Path, make_optimizer: Callable[[Any], Any], kind: str) -> None:
    straight = run_with(make(kind), make_optimizer, tmp_path / "straight")
    before = adapters(straight.model)
    straight.train()
    run_with(make(kind), make_optimizer, tmp_path / "cut", StopAndSave()).train()
    resumed = run_with(make(kind), make_optimizer, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert_identical([adapters(resumed.model), log(resumed)], [adapters(straight.model), log(straight)])
    assert_identical(resumed.optimizer.state_dict(), straight.optimizer.state_dict())
    now = adapters(resumed.model)
    assert now.keys() == before.keys()
    assert all(not torch.equal(p, before[name]) for name, p in now.items())


def test_loraplus_gives_gains_its_ratio_and_no_decay() -> None:
    model = make("gains")
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.5
    )
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            is_A, is_gain = ("lora_A" in names[id(parameter)], "magnitude" in names[id(parameter)])
            assert group["lr"] == pytest.approx(1e-3 if is_A else 8e-3)
            assert group["weight_decay"] == (0.0 if is_gain else 0.5)


@pytest.mark.parametrize("kind", ["gains", "biases"])
def test_lorafa_pairs_each_a_with_its_own_b(kind: str) -> None:
    """Also where a gain or a bias stands between them, which is stepped as AdamW does, without decay."""
    model = make(kind)
    optimizer = lorafa(model)
    pairs, alone = optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    of_lora = [names[id(p)] for p, name in zip(pairs["params"], pairs["names"], strict=True) if "lora" in name]
    assert [name.rpartition(".lora_")[0] for name in of_lora[::2]] == [
        name.rpartition(".lora_")[0] for name in of_lora[1::2]
    ]
    assert all("lora_A" in a and "lora_B" in b for a, b in zip(of_lora[::2], of_lora[1::2], strict=True))
    assert len(of_lora) == 28
    assert alone["weight_decay"] == 0.0
    assert not any("lora" in name for name in alone["names"])
    parameter = alone["params"][0]
    with torch.no_grad():
        parameter.fill_(0.5)
    copy = nn.Parameter(parameter.detach().clone())
    other = torch.optim.AdamW([copy], lr=1e-2, eps=1e-6, weight_decay=0.0)
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        parameter.grad = copy.grad = torch.full_like(parameter, 0.1 * (step + 1))
        optimizer.step()
        other.step()
    # LoRA-FA adds ε before the bias correction and torch after it: of a step of 0.01, 1e-6 / (0.1 · √0.001), 3e-4
    torch.testing.assert_close(parameter, copy, rtol=0, atol=3 * 1e-2 * 1e-3)


@pytest.mark.parametrize("kind", ["gains", "biases"])
def test_a_lorafa_that_was_imported_before_us_is_refused(tmp_path: Path, kind: str) -> None:
    original = inspect.unwrap(create_lorafa_optimizer)
    run = run_with(make(kind), lambda model: original(model, RANK, ALPHA, 1e-2), tmp_path)
    with pytest.raises(ConfigError, match=r"would take .*default.* for an A or a B .* Import hf_qlora first"):
        run.train()
    assert run.state.global_step == 0
    same = run_with(make("nf4"), lambda model: original(model, RANK, ALPHA, 1e-2), tmp_path)
    assert same.train().global_step == 2 * HALF  # there is nothing to take for another


def test_lorafa_of_a_stock_adapter_is_as_peft_makes_it() -> None:
    model = get_peft_model(base(), LoraConfig(r=RANK, target_modules=["q_proj"], lora_bias=True))
    (group,) = lorafa(model).param_groups
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert group["names"] == list(names)
    assert all(a is b for a, b in zip(group["params"], parameters, strict=True))
    assert group["weight_decay"] == 0.1


# LoRA-FA's frozen A


def fa_backward(A_learns: bool) -> tuple[int, int]:
    """FLOPs of a layer's backward, and the bytes that it keeps beside its parameters."""
    T, K, N, r = 64, 48, 32, 4
    x = torch.randn(T, K, requires_grad=True)
    A, B = torch.randn(r, K, requires_grad=A_learns), torch.randn(N, r, requires_grad=True)
    W, kept = torch.randn(N, K), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = lora_linear(x, lambda: W, None, [Adapter(A, B, 2.0)])
    with FlopCounterMode(display=False) as counted:
        y.sum().backward()
    own = {tensor.untyped_storage().data_ptr() for tensor in (A, B)}
    return counted.get_total_flops(), sum(size for pointer, size in kept.items() if pointer not in own)


def test_a_frozen_a_costs_no_gradient_and_keeps_no_input() -> None:
    T, K, r = 64, 48, 4
    frozen, learning = fa_backward(False), fa_backward(True)
    assert learning[0] - frozen[0] == 2 * T * r * K  # dA = gsᵀ x
    assert learning[1] - frozen[1] == 4 * T * K  # x
    assert frozen[1] == 4 * T * r  # s


@pytest.mark.parametrize("changes", [{}, {"use_dora": True, "lora_dropout": 0.0}], ids=["lora", "dora"])
@pytest.mark.parametrize("quantization", [NF4Config(), None], ids=["nf4", "dense"])
def test_with_a_frozen_a_the_other_gradients_are_the_same(changes: dict[str, Any], quantization: Any) -> None:
    gradients = []
    tokens = torch.stack([row["input_ids"] for row in rows(2)])
    for frozen in (True, False):
        model = make("nf4", quantization=quantization, init_lora_weights=False, **changes)
        for name, parameter in model.named_parameters():
            if frozen and "lora_A" in name:
                parameter.requires_grad_(False)
        torch.manual_seed(4)
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert not any("lora_A" in name for name in gradients[0])
    assert any("lora_A" in name for name in gradients[1])
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])
