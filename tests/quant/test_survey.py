"""The report on whole models: which layers, what errors, which outliers, and a skip list that does what it says."""

from __future__ import annotations

import copy
import json
import math
import statistics
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from architectures import ARCHITECTURES, Architecture, gpt2, llama
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_qlora import NF4Config, QuantizationReport, quantization_report, quantize_model
from hf_qlora.quant.checks import BaseModelError
from hf_qlora.quant.footprint import footprint
from hf_qlora.quant.linear4bit import dense_weight
from hf_qlora.quant.reference import dequantize_nf4, quantize_nf4
from hf_qlora.quant.report import outlier_bound
from hf_qlora.validation import ConfigError


OUTLIER = "model.layers.1.mlp.down_proj"


def with_outlier() -> nn.Module:
    """A model one of whose layers has a weight in every block that is far from the rest, and larger weights."""
    model = llama(num_hidden_layers=4)
    with torch.no_grad():
        weight = model.get_submodule(OUTLIER).weight
        weight.mul_(3)
        weight.view(-1)[::64] = 8 * weight.std()
    return model


def packed_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]


def reference_error(weight: Tensor, config: NF4Config) -> float:
    quantized = quantize_nf4(weight.contiguous(), config.block_size, config.double_quant)
    rest = weight.double() - dequantize_nf4(quantized).double()
    return float(rest.norm() / weight.double().norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_layers_are_those_that_quantize_model_packs_with_the_specifications_error(architecture: Architecture) -> None:
    model = architecture.make()
    skip = architecture.options.get("modules_to_save", ())
    config = NF4Config()
    report = quantization_report(model, config, quant_types=("nf4",), skip=skip)
    weights = {layer.name: dense_weight(model.get_submodule(layer.name)).clone() for layer in report.layers}
    total = footprint(quantize_model(model, config, skip=skip))
    assert [layer.name for layer in report.layers] == packed_names(model)
    assert report.bits("nf4-64-dq") == pytest.approx(total.bits_per_quantized_param, rel=1e-12)
    for layer in report.layers:
        # float32 differences against float64's, and the last bit of the nested offset
        assert layer.errors["nf4-64-dq"] == pytest.approx(reference_error(weights[layer.name], config), rel=1e-5)
        assert layer.shape == tuple(weights[layer.name].shape)


def test_the_model_is_not_changed() -> None:
    model = llama()
    before = copy.deepcopy(model)
    quantization_report(model, block_sizes=[128], budget="20%")
    assert model.config.to_dict() == before.config.to_dict()
    assert vars(model).keys() == vars(before).keys()
    for (name, now), (_, then) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert now.dtype == then.dtype, name
        assert torch.equal(now, then), name
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]


def test_every_type_block_size_and_kind_of_scales_is_compared_the_configs_own_first() -> None:
    report = quantization_report(llama(), NF4Config(block_size=128, double_quant=False), block_sizes=[64, 128])
    assert report.schemes[0] == "nf4-128"
    expected = {f"{kind}-{size}{dq}" for kind in ("nf4", "fp4") for size in (64, 128) for dq in ("", "-dq")}
    assert sorted(report.schemes) == sorted(expected)
    assert all(layer.errors.keys() == expected == layer.nbytes.keys() for layer in report.layers)
    assert report.error("nf4-64") < report.error("nf4-128") < report.error("fp4-128")


def test_the_error_over_all_layers_is_that_of_one_long_weight() -> None:
    model = with_outlier()
    report = quantization_report(model, quant_types=("nf4",))
    weights = {layer.name: dense_weight(model.get_submodule(layer.name)) for layer in report.layers}
    rest = {name: w.double() - dequantize_nf4(quantize_nf4(w.contiguous())).double() for name, w in weights.items()}
    norm = torch.cat([w.double().flatten() for w in weights.values()]).norm()
    expected = torch.cat([r.flatten() for r in rest.values()]).norm() / norm
    assert report.error("nf4-64-dq") == pytest.approx(float(expected), rel=1e-5)  # as for a layer
    expected = torch.cat([r.flatten() for name, r in rest.items() if name != OUTLIER]).norm() / norm
    assert report.error("nf4-64-dq", without=[OUTLIER]) == pytest.approx(float(expected), rel=1e-5)


def test_an_outlier_layer_is_found_and_suggested_first() -> None:
    model = with_outlier()
    weight = model.get_submodule(OUTLIER).weight
    report = quantization_report(model, quant_types=("nf4",), budget=weight.nbytes)
    assert report.outliers == [OUTLIER]
    assert report.left_dense == [OUTLIER]
    (layer,) = [layer for layer in report.layers if layer.name == OUTLIER]
    assert layer.peak == max(each.peak for each in report.layers)
    assert OUTLIER in str(report).partition("outliers")[2].splitlines()[0]


def test_layers_that_are_all_alike_have_no_outliers() -> None:
    assert quantization_report(llama(num_hidden_layers=4)).outliers == []


def test_the_bound_is_the_robust_one() -> None:
    errors = [0.08, 0.09, 0.1, 0.11, 0.5]
    logs = [math.log(error) for error in errors]
    mad = statistics.median(abs(log - math.log(0.1)) for log in logs)
    assert outlier_bound([*errors, 0.0]) == pytest.approx(0.1 * math.exp(3.5 * 1.4826 * mad))
    assert outlier_bound([0.1] * 9) == pytest.approx(0.1 * math.exp(3.5 * 1.4826 * 0.01))
    assert outlier_bound([0.0]) == math.inf


@pytest.mark.parametrize("make", [with_outlier, gpt2, ARCHITECTURES[3].make, ARCHITECTURES[4].make])
@pytest.mark.parametrize("budget", ["5%", "10%", "40%"])
def test_the_skip_list_leaves_just_the_suggested_layers_dense_at_its_cost(make: Any, budget: str) -> None:
    model = make()
    report = quantization_report(model, quant_types=("nf4",), budget=budget)
    assert report.left_dense
    plain, skipped = copy.deepcopy(model), copy.deepcopy(model)
    quantize_model(plain)
    quantize_model(skipped, NF4Config(skip_modules=report.skip_modules))
    assert set(packed_names(plain)) - set(packed_names(skipped)) == set(report.left_dense)
    # Code tables, which the footprint counts apart, are the same.
    extra = footprint(skipped).total_bytes - footprint(plain).total_bytes
    assert extra == report.extra_bytes <= report.budget_bytes
    assert report.budget_bytes == int(footprint(model).total_bytes * float(budget[:-1]) / 100)


def test_the_skip_list_keeps_the_configs_own_names() -> None:
    model, config = llama(), NF4Config(skip_modules=("lm_head", "k_proj"))
    report = quantization_report(model, config, quant_types=("nf4",), budget="10%")
    assert report.skip_modules == ["lm_head", "k_proj", *report.left_dense]
    quantize_model(model, NF4Config(skip_modules=report.skip_modules))
    assert not any(name.endswith("k_proj") for name in packed_names(model))


class Stacks(nn.Module):
    """Names of which one is the end of another: leaving "h.0.up" dense leaves "encoder.h.0.up" dense, too."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(64, 64, bias=False)}) for _ in range(2))
        self.encoder = nn.ModuleDict(
            {"h": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(64, 64, bias=False)}) for _ in range(2))}
        )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_name_that_names_two_layers_costs_both(count: int) -> None:
    model = Stacks()
    with torch.no_grad():
        model.h[0]["up"].weight.mul_(10)
        model.encoder["h"][1]["up"].weight.mul_(5)
    one = 64 * 64 * 4
    report = quantization_report(model, quant_types=("nf4",), budget=count * one)
    assert report.extra_bytes <= count * one
    expected = copy.deepcopy(model)
    quantize_model(expected, NF4Config(skip_modules=report.skip_modules))
    dense = {name for name, module in expected.named_modules() if type(module) is nn.Linear}
    assert dense == set(report.left_dense)
    if count > 1:
        assert {"h.0.up", "encoder.h.0.up"} <= dense


def test_a_weight_that_layers_share_is_one_and_costs_once() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    model[2].weight = model[0].weight
    report = quantization_report(model, quant_types=("nf4",), budget="100%")
    assert [layer.name for layer in report.layers] == ["0", "1"]
    quantize_model(dense := copy.deepcopy(model), NF4Config(skip_modules=("0",)))
    assert packed_names(dense) == ["1"]
    assert report.left_dense == ["0", "1"]


def test_the_report_is_json_and_back() -> None:
    report = quantization_report(with_outlier(), budget="10%")
    values = json.loads(report.to_json())
    assert QuantizationReport.from_dict(values) == report
    assert values["outliers"] == report.outliers
    assert values["bits"]["nf4-64-dq"] == report.bits("nf4-64-dq")
    with pytest.raises(ConfigError, match="no quantization report"):
        QuantizationReport.from_dict({**values, "layers": [{}]})


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_base_in_nf4_tells_bits_and_with_its_original_the_error(double_quant: bool) -> None:
    config = NF4Config(double_quant=double_quant)
    original = with_outlier().to(torch.bfloat16)
    packed = quantize_model(copy.deepcopy(original), config)
    expected = quantization_report(original, config, quant_types=("nf4",))
    scheme = expected.schemes[0]
    alone = quantization_report(packed)
    assert not alone.measured
    assert alone.schemes == [scheme]
    assert alone.bits(scheme) == expected.bits(scheme)
    assert "not known" in str(alone)
    assert json.loads(alone.to_json())["error"] is None
    assert QuantizationReport.from_dict(json.loads(alone.to_json())) == alone
    found = quantization_report(packed, original=original)
    assert found.outliers == expected.outliers == [OUTLIER]
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert (ours.name, ours.shape, ours.dense_bytes) == (theirs.name, theirs.shape, theirs.dense_bytes)
        assert ours.errors == {scheme: theirs.errors[scheme]}
    with pytest.raises(BaseModelError, match="another model"):
        quantization_report(packed, original=llama(num_hidden_layers=4, intermediate_size=192))
    with pytest.raises(BaseModelError, match=r"no dense linear layer model\.layers\.2"):
        quantization_report(packed, original=llama())
    with pytest.raises(ConfigError, match="needs the dense weights"):
        quantization_report(packed, budget="5%")


def broken(value: float) -> nn.Module:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    return model


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: nn.Sequential(nn.Embedding(4, 4)), {}, "No linear layer"),
        (lambda: broken(math.nan), {}, r"model\.layers\.1\.mlp\.up_proj\.weight has NaN or infinite"),
        (lambda: broken(-math.inf), {}, r"model\.layers\.1\.mlp\.up_proj\.weight has NaN or infinite"),
        (lambda: llama().to("meta"), {}, "meta device"),
        (lambda: get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), {}, "have adapters"),
        (llama, {"block_sizes": [100]}, r"block_size=100 .* choose one of \(32, 64"),
        (llama, {"quant_types": ["int4"]}, "quant_type='int4' .* choose one of"),
        (llama, {"budget": -1}, "no number of bytes"),
        (llama, {"budget": "lots"}, "no number of bytes"),
        (llama, {"budget": 100}, "smallest that works is 28536 bytes"),  # 64 × 128 × 4 − (4096 + 128 + 4 + 4)
        (llama, {"original": nn.Linear(2, 2)}, "this one is dense"),
        (llama, {"config": "nf4"}, "must be an NF4Config"),
    ],
)
def test_what_cannot_be_reported_on_is_refused(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((BaseModelError, ConfigError), match=message):
        quantization_report(make(), **settings)


def test_the_least_budget_that_is_named_works() -> None:
    assert len(quantization_report(llama(), quant_types=("nf4",), budget=28536).left_dense) == 1


def test_the_table_has_a_row_for_each_kind_or_each_layer_and_names_stay_as_they_are() -> None:
    model = nn.ModuleDict({"[red]": nn.ModuleList(nn.ModuleDict({"[b]up": nn.Linear(64, 64)}) for _ in range(3))})
    report = quantization_report(model, budget="90%")
    assert [line.split()[:2] for line in str(report).splitlines() if line.startswith("[b]up")] == [["[b]up", "3"]]
    rows = [line for line in report.to_text(every_layer=True).splitlines() if line.startswith("[red]")]
    assert [row.split()[0] for row in rows] == [f"[red].{i}.[b]up" for i in range(3)]
    assert str(report).splitlines()[-1].endswith(f"(skip_modules={report.skip_modules!r})")


def test_the_picture(tmp_path: Path) -> None:
    quantization_report(with_outlier()).plot(tmp_path / "map.png")
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    assert (tmp_path / "map.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="original="):
        quantization_report(quantize_model(llama())).plot(tmp_path / "no.png")
