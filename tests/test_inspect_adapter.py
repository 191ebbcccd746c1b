"""What `hf-qlora inspect` says of a folder is what the model had."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import gpt2, llama
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from hf_qlora import AdaptiveDepthLoRAConfig, QLoRAConfig
from hf_qlora.cli import app
from hf_qlora.files import AdapterFileError
from hf_qlora.inspect_adapter import read_modules, show
from hf_qlora.layers import depth


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def save(
    folder: Path, cls: type[LoraConfig] = AdaptiveDepthLoRAConfig, base: nn.Module | None = None, **settings: Any
) -> PeftModel:
    torch.manual_seed(0)
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, **settings}
    model = get_peft_model(base or llama(num_hidden_layers=12), cls(**values))
    with torch.no_grad():
        for scale in depth.scales(model, "default").values():
            scale.bias.copy_(torch.randn(1))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (AdaptiveDepthLoRAConfig, {}),
        (
            AdaptiveDepthLoRAConfig,
            {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        ),
        (QLoRAConfig, {"use_rslora": True}),
        (QLoRAConfig, {"portable": False, "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
        (QLoRAConfig, {}),
    ],
)
def test_modules_are_those_of_the_model(cls: type[QLoRAConfig], settings: dict[str, Any], tmp_path: Path) -> None:
    model = save(tmp_path, cls, **settings)
    config, modules, others = read_modules(str(tmp_path))
    assert not others
    assert type(config) is cls
    layers = [(n, m) for n, m in model.get_base_model().named_modules() if "default" in getattr(m, "r", ())]
    assert len(modules) == len(layers) == 24
    assert [module.layer for module in modules[::2]] == [f"model.layers.{i}" for i in range(12)]
    by_name = {f"{module.layer}.{module.name}": module for module in modules}
    for name, layer in layers:
        module, scale = by_name[name], depth.scale_of(layer, "default")
        expected = layer.get_delta_weight("default") * (scale.value if scale else 1.0)
        assert module.delta == pytest.approx(float(expected.norm()), rel=1e-4)
        assert module.rank == layer.r["default"]
        assert module.gain == (pytest.approx(scale.gain) if scale else None)


def test_conv1d_adapters_are_read_too(tmp_path: Path) -> None:
    save(tmp_path, base=gpt2(), target_modules=["c_attn"])
    assert [module.layer for module in read_modules(str(tmp_path))[1]] == ["transformer.h.0", "transformer.h.1"]


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    save(tmp_path / "adapter")
    console = Console(record=True, width=80)
    show(str(tmp_path / "adapter"), tmp_path / "map.png", console)
    text = console.export_text()
    assert "AdaptiveDepthLoRAConfig," in text
    assert "layers of model.layers" in text
    assert [line.split()[0] for line in text.splitlines() if "up_proj" in line] == [str(i) for i in range(12)]
    assert "…" not in text
    assert re.search(r"fold +g *$", text, re.MULTILINE)
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_what_the_table_leaves_out_is_said(tmp_path: Path) -> None:
    model = get_peft_model(llama(), QLoRAConfig(r=2, target_modules=["q_proj", "embed_tokens"], quantization=None))
    model.save_pretrained(tmp_path / "embedded")
    dora = get_peft_model(llama(), QLoRAConfig(r=2, target_modules=["q_proj"], use_dora=True))
    dora.save_pretrained(tmp_path / "dora")
    console = Console(record=True, width=120)
    show(str(tmp_path / "embedded"), console=console)
    show(str(tmp_path / "dora"), console=console)
    text = console.export_text()
    assert len(re.findall(r"other tensors are not shown: .*embed_tokens", text)) == 1
    assert "magnitudes" in text
    assert text.count("not shown") == 1


def test_the_command(tmp_path: Path) -> None:
    save(tmp_path / "adapter")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "adapter")])
    assert result.exit_code == 0
    assert "self_attn.q_proj" in result.output


@pytest.mark.parametrize("problem", ["nothing", "stock", "truncated", "not json"])
def test_what_cannot_be_inspected_is_an_error_of_one_line(problem: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save(folder, LoraConfig if problem == "stock" else QLoRAConfig)
    if problem == "nothing":
        folder = tmp_path / "elsewhere"
    if problem == "truncated":
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    if problem == "not json":
        (folder / "adapter_config.json").write_text("{")
    with pytest.raises((AdapterFileError, json.JSONDecodeError)):
        read_modules(str(folder))
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
