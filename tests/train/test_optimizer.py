"""Every trainable parameter is in one group, with the rate and decay of its kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import llama, tokens
from peft import PeftModel, get_peft_model

from hf_qlora import AdaptiveDepthLoRAConfig, QLoRAConfig, create_optimizer
from hf_qlora.validation import ConfigError


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def model(cls: type[QLoRAConfig] = AdaptiveDepthLoRAConfig, **settings: Any) -> PeftModel:
    return get_peft_model(llama(), cls(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings}))


def groups(optimizer: torch.optim.Optimizer, of: PeftModel) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in of.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_each_kind_has_its_rate_and_decay() -> None:
    trained = model(modules_to_save=["norm"], gain_lr_ratio=3.0, lora_bias=True)
    found = groups(create_optimizer(trained, lr=0.1, weight_decay=0.5), trained)
    assert found.keys() == {name for name, p in trained.named_parameters() if p.requires_grad}
    for name, settings in found.items():
        expected = (0.1, 0.5) if "weight" in name and "norm" not in name else (0.1, 0.0)
        assert settings == pytest.approx((0.3, 0.0) if "vector" in name else expected), name


def test_an_explicit_ratio_is_used() -> None:
    trained = model()
    found = groups(create_optimizer(trained, torch.optim.SGD, lr=0.1, gain_lr_ratio=7.0, momentum=0.9), trained)
    assert [rate for name, (rate, _) in found.items() if "vector" in name] == pytest.approx([0.7, 0.7])


def test_adapters_without_gains_have_two_groups_at_most() -> None:
    trained = model(QLoRAConfig)
    assert len(create_optimizer(trained, lr=0.1).param_groups) == 1


@pytest.mark.parametrize(
    ("settings", "words"), [({"gain_lr_ratio": 0.0}, "positive"), ({"gain_lr_ratio": float("nan")}, "positive")]
)
def test_a_senseless_ratio_is_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        create_optimizer(model(), lr=0.1, **settings)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    trained = model()
    trained.requires_grad_(False)
    with pytest.raises(ConfigError, match="is_trainable=True"):
        create_optimizer(trained, lr=0.1)


def test_two_active_adapters_with_other_ratios_need_one_given() -> None:
    trained = model(gain_lr_ratio=2.0)
    trained.add_adapter("second", AdaptiveDepthLoRAConfig(r=2, target_modules=["q_proj"], gain_lr_ratio=3.0))
    trained.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match=r"\[2.0, 3.0\]"):
        create_optimizer(trained, lr=0.1)
    create_optimizer(trained, lr=0.1, gain_lr_ratio=2.0)


def test_trainer_takes_it(tmp_path: Path) -> None:
    trained = model(init_lora_weights=False)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens()]
    arguments = tf.TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
    optimizer = create_optimizer(trained, lr=1e-2)
    tf.Trainer(trained, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert all(p.abs() > 0 for name, p in trained.named_parameters() if "vector" in name)


def test_a_transformers_model_with_an_adapter_has_an_optimizer_too() -> None:
    model = llama()
    model.add_adapter(AdaptiveDepthLoRAConfig(r=2, target_modules=["q_proj"], gain_lr_ratio=7.0))
    rates = sorted(group["lr"] for group in create_optimizer(model, lr=1e-3).param_groups)
    assert rates == pytest.approx([1e-3, 7e-3])


@pytest.mark.parametrize("ratio", ["10", float("inf"), float("nan"), 0])
def test_a_ratio_that_is_none_is_refused(ratio: Any) -> None:
    model = get_peft_model(llama(), AdaptiveDepthLoRAConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="gain_lr_ratio"):
        create_optimizer(model, lr=1e-3, gain_lr_ratio=ratio)


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="no adapter"):
        create_optimizer(llama(), lr=1e-3)
