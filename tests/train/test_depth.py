"""What is logged and drawn of depth scales is what the layers have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import llama, tokens
from peft import PeftModel, get_peft_model

from hf_qlora import AdaptiveDepthLoRAConfig, DepthScaleCallback, QLoRAConfig, plots
from hf_qlora.layers import depth
from hf_qlora.layers.norms import product_norm, weight_norm
from hf_qlora.validation import ConfigError


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trainer(folder: Path, cls: type[QLoRAConfig] = AdaptiveDepthLoRAConfig, **settings: Any) -> tf.Trainer:
    torch.manual_seed(0)
    given = cls(**{"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, **settings})
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens()]
    arguments = tf.TrainingArguments(
        str(folder),
        max_steps=4,
        logging_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return tf.Trainer(get_peft_model(llama(), given), arguments, train_dataset=rows)


class Reporter(tf.TrainerCallback):
    """Stands for TensorBoard and the like, which come before a user's callbacks."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.seen.append({"step": state.global_step, **logs})


def test_scales_reach_whatever_the_trainer_reports_to(tmp_path: Path) -> None:
    watched, reporter = trainer(tmp_path), Reporter()
    watched.add_callback(reporter)
    watched.add_callback(DepthScaleCallback(watched))
    watched.train()
    logged = [logs for logs in reporter.seen if "depth/model.layers.0/gain" in logs]
    assert [logs["step"] for logs in logged] == [2, 4]
    model: Any = watched.model
    for i in range(2):
        names = [f"base_model.model.model.layers.{i}.{name}" for name in ("self_attn.q_proj", "mlp.up_proj")]
        found = [depth.scales(model, "default")[name] for name in names]
        layers = [model.get_submodule(name) for name in names]
        last = {
            kind: logged[-1][f"depth/model.layers.{i}/{kind}"] for kind in ("profile", "gain", "attention", "delta")
        }
        assert last["profile"] == pytest.approx(found[0].profile)
        assert last["gain"] == pytest.approx(sum(scale.gain for scale in found) / 2)
        assert last["attention"] == 1.0
        deltas = [
            (layer.get_delta_weight("default") * scale.value).norm() / layer.base_layer.dequantize().norm()
            for layer, scale in zip(layers, found, strict=True)
        ]
        assert last["delta"] == pytest.approx(float(sum(deltas)) / 2, rel=1e-4)
    assert (tmp_path / "depth_scales.png").stat().st_size > 1000
    assert not list(tmp_path.glob(".*"))


def test_without_a_plot_nothing_is_written_and_matplotlib_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    watched = trainer(tmp_path)
    with pytest.raises(ImportError, match="pip install 'hf-qlora"):
        DepthScaleCallback(watched)
    watched.add_callback(DepthScaleCallback(watched, plot=False))
    watched.train()
    assert not (tmp_path / "depth_scales.png").exists()


def test_an_adapter_without_scales_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no depth scales"):
        DepthScaleCallback(trainer(tmp_path, QLoRAConfig))
    dense = tf.Trainer(llama(), tf.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        DepthScaleCallback(dense)


@pytest.mark.parametrize("shape", [(5, 3, 7), (4, 4, 4), (1, 1, 1)])
def test_product_norm_is_the_norm_of_the_product(shape: tuple[int, int, int]) -> None:
    out, r, inner = shape
    B, A = torch.randn(out, r), torch.randn(r, inner)
    # double precision inside; the product here is made in it too
    assert product_norm(B, A) == pytest.approx(float((B.double() @ A.double()).norm()), rel=1e-9)
    assert product_norm(torch.zeros(out, r), A) == 0.0


def test_weight_norm_unpacks(tmp_path: Path) -> None:
    model: Any = trainer(tmp_path).model
    assert isinstance(model, PeftModel)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert weight_norm(layer) == pytest.approx(float(layer.dequantize().norm()))


def test_maps_bear_missing_modules_and_one_value(tmp_path: Path) -> None:
    grid = {("model.layers.0", "q_proj"): 1.0, ("model.layers.1", "v_proj"): 1.0, ("", "lm_head"): 0.0}
    plots.heat_maps({"one": grid, "two": {("model.layers.0", "q_proj"): math.pi}}, tmp_path / "deep" / "x.png", "c")
    assert (tmp_path / "deep" / "x.png").stat().st_size > 1000
