"""The configs: what they accept and refuse, what they write, and that whatever they accept comes back as it was."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import math
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import llama, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import config as lora_config
from torch import nn
from transformers import BitsAndBytesConfig

from hf_qlora import NF4Config, QLoRAConfig
from hf_qlora.config import qlora
from hf_qlora.config import record as record_module
from hf_qlora.config.nf4 import BLOCK_SIZES
from hf_qlora.config.record import FORMAT_VERSION, write_json
from hf_qlora.validation import ConfigError


GOLDEN = Path(__file__).parent / "golden" / "adapter_config.json"
READERS = (QLoRAConfig, PeftConfig, LoraConfig)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the tensors here are far too small to share


class Block(nn.Module):
    """The least model an adapter can be put on: two linear layers and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.e = nn.Linear(16, 16), nn.Linear(16, 16), nn.Embedding(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v(self.q(x))


def short(value: Any) -> str | None:
    """A parameter as part of a test's name."""
    return None if isinstance(value, NF4Config) else f"{value!r}"[:24]


def small_llama() -> nn.Module:
    torch.manual_seed(0)
    return llama(hidden_size=32, intermediate_size=32)


def write(folder: Path, values: Any) -> Path:
    """An adapter_config.json with these values."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def read(folder: Path) -> dict[str, Any]:
    """What is in a folder's adapter_config.json."""
    values: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return values


def stock_part(folder: Path) -> dict[str, Any]:
    """What a reader without this package takes from a folder's adapter_config.json."""
    return {name: value for name, value in read(folder).items() if name != "hf_qlora"}


def saved(config: QLoRAConfig, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    return read(folder)


# ── NF4Config ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("double_quant", 1, "True or False"),
        ("double_quant", None, "True or False"),
        ("double_quant", "yes", "True or False"),
        ("block_size", 0, "64"),
        ("block_size", 63, "64"),
        ("block_size", 16, "(32, 64, 128, 256, 512, 1024, 2048, 4096)"),
        ("block_size", 8192, "4096"),
        ("block_size", -64, "64"),
        ("block_size", True, "64"),
        ("block_size", "64", "64"),
        ("block_size", None, "64"),
        ("block_size", [64], "64"),
        ("block_size", 64.0, "64"),
        ("compute_dtype", "int8", "bfloat16"),
        ("compute_dtype", "bf16", "bfloat16"),
        ("compute_dtype", "torch.torch.bfloat16", "bfloat16"),
        ("compute_dtype", "", "bfloat16"),
        ("compute_dtype", torch.int8, "('float32', 'bfloat16', 'float16')"),
        ("compute_dtype", torch.float64, "None"),
        ("compute_dtype", 16, "bfloat16"),
        ("compute_dtype", ["bfloat16"], "bfloat16"),
        ("skip_modules", "lm_head", "('lm_head',)"),
        ("skip_modules", "", "tuple"),
        ("skip_modules", b"lm_head", "tuple"),
        ("skip_modules", ["lm_head", 1], "tuple"),
        ("skip_modules", [None], "tuple"),
        ("skip_modules", None, "tuple"),
        ("skip_modules", 3, "tuple"),
        ("skip_modules", True, "tuple"),
    ],
)
def test_nf4_config_refuses(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as error:
        NF4Config(**{field: value})
    assert f"{field}={value!r}" in str(error.value)
    assert allowed in str(error.value).replace(f"{field}={value!r}", "")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"blocksize": 64}, ["blocksize", "block_size"]),
        ({"quant_type": "fp4"}, ["fp4", "nf4"]),
        ({"quant_type": None}, ["None", "nf4"]),
        ({"skip_modules": "lm_head"}, ["lm_head", "list"]),
        ({"skip_modules": None}, ["None", "list"]),
        ({"skip_modules": {"lm_head": 1}}, ["lm_head", "list"]),
        ({"block_size": 48}, ["48", "64"]),
        ({1: 2, "nonsense": 3}, ["nonsense", "block_size"]),
    ],
)
def test_nf4_config_from_dict_refuses(values: dict[Any, Any], words: list[str]) -> None:
    for make in (NF4Config.from_dict, lambda given: QLoRAConfig(quantization=given)):
        with pytest.raises(ConfigError) as error:
            make(values)
        assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_nf4_config_comes_back_from_json(
    block_size: int, double_quant: bool, compute_dtype: torch.dtype | None
) -> None:
    config = NF4Config(
        double_quant=double_quant, block_size=block_size, compute_dtype=compute_dtype, skip_modules=("a", "b.c")
    )
    again = NF4Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert (again.double_quant, again.block_size, again.compute_dtype) == (double_quant, block_size, compute_dtype)
    assert again.skip_modules == ("a", "b.c")


def test_what_json_has_not_is_written_as_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [math.nan, 1.5, {"b": -math.inf}], "c": (math.inf,), "d": None, "e": True})
    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read == {"a": [None, 1.5, {"b": None}], "c": [None], "d": None, "e": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_compute_dtype_is_one_however_it_is_spelled(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    spelled = [NF4Config(compute_dtype=given) for given in (dtype, name, f"torch.{name}")]
    assert [config.compute_dtype for config in spelled] == [dtype] * 3
    assert len(set(spelled)) == 1
    assert spelled[0].to_dict()["compute_dtype"] == name


def test_skip_modules_are_a_tuple_whatever_they_came_as() -> None:
    assert NF4Config(skip_modules=["lm_head"]) == NF4Config(skip_modules=("lm_head",)) == NF4Config()  # type: ignore[arg-type]
    assert NF4Config(skip_modules=()).skip_modules == ()


def test_nf4_config_is_the_published_recipe_by_default_and_frozen() -> None:
    config = NF4Config()
    assert (config.quant_type, config.double_quant, config.block_size) == ("nf4", True, 64)
    assert (config.compute_dtype, config.skip_modules) == (None, ("lm_head",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_size = 32  # type: ignore[misc]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (NF4Config(), {}),
        (NF4Config(double_quant=False), {"bnb_4bit_use_double_quant": False}),
        (NF4Config(compute_dtype="bfloat16"), {"bnb_4bit_compute_dtype": torch.bfloat16}),
        (NF4Config(compute_dtype=torch.float16), {"bnb_4bit_compute_dtype": torch.float16}),
        (NF4Config(skip_modules=("score", "a.b")), {"llm_int8_skip_modules": ["score", "a.b"]}),
        (NF4Config(skip_modules=()), {"llm_int8_skip_modules": []}),
    ],
)
def test_to_bitsandbytes_says_the_same(config: NF4Config, expected: dict[str, Any]) -> None:
    stock = BitsAndBytesConfig(
        **{
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_storage": torch.uint8,
            **expected,
        }
    )
    assert config.to_bitsandbytes().to_dict() == stock.to_dict()


@pytest.mark.parametrize("block_size", [size for size in BLOCK_SIZES if size != 64])
def test_to_bitsandbytes_refuses_a_block_size_that_it_cannot_say(block_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"block_size={block_size} .* means 64"):
        NF4Config(block_size=block_size).to_bitsandbytes()


# ── QLoRAConfig: what is refused ─────────────────────────────────────────────────────────────────────────────────────

HUGE = 10**400  # an int that no float holds; JSON may have it
OVERLONG = "a{99999999999999}"  # re raises OverflowError
OVERDEEP = "(" * 3000  # re raises RecursionError


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        *(("r", value, "positive integer") for value in (0, -1, 8.0, 0.5, True, "8", None, [8], math.nan, HUGE)),
        *(("lora_alpha", value, "positive number") for value in (0, -16, True, "16", None, math.nan, math.inf, HUGE)),
        *(("lora_dropout", value, "[0, 1)") for value in (-0.1, 1, 1.0, 5, math.nan, math.inf, True, "0.1", None)),
        *(("portable", value, "True or False") for value in (1, 0, None, "yes")),
        *(("quantization", value, "NF4Config, its dict, or None") for value in (True, "nf4", 4, [], NF4Config)),
        *((name, value, "dict") for name in ("rank_pattern", "alpha_pattern") for value in (4, "q", ["q"], True)),
    ],
    ids=short,
)
@pytest.mark.parametrize("quantization", [NF4Config(), None], ids=["nf4", "dense"])
def test_qlora_config_refuses(field: str, value: Any, allowed: str, quantization: NF4Config | None) -> None:
    with pytest.raises(ConfigError) as error:
        QLoRAConfig(**{"quantization": quantization, field: value})
    assert f"{field}={value!r}" in str(error.value)
    assert allowed in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("rank_pattern", value) for value in (0, -1, 2.5, True, "4", None, HUGE)),
        *(("alpha_pattern", value) for value in (0, -1, True, "4", None, math.nan, math.inf, HUGE)),
    ],
    ids=short,
)
def test_a_pattern_without_a_positive_value_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        QLoRAConfig(**{field: {"k": 4, "q": value}})
    assert f"{field}['q']={value!r} must be positive" in str(error.value)


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        (field, pattern)
        for field in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules")
        for pattern in ("(", "*", "[a", "(?P<x", OVERLONG, OVERDEEP, 7, None)
        if isinstance(pattern, str) or not field.endswith("modules")  # 7 and None are no regular expressions there
    ],
    ids=short,
)
def test_a_broken_regular_expression_is_refused(field: str, pattern: Any) -> None:
    with pytest.raises(ConfigError, match="is not a regular expression") as error:
        QLoRAConfig(**{field: {pattern: 4} if field.endswith("pattern") else pattern})
    assert field in str(error.value)
    assert repr(pattern)[:100] in str(error.value)


# A switch given as 1, a name given as bytes: PEFT takes them, and what it makes of them is not what was meant; or it
# trains and saves, and the file is then refused.
WRONG_TYPES: list[tuple[str, Any]] = [
    ("use_rslora", 1),
    ("use_rslora", "no"),
    ("use_dora", "False"),
    ("lora_bias", 0.5),
    ("fan_in_fan_out", "x"),
    ("bias", "some"),
    ("bias", "pissa_niter_4"),
    ("bias", None),
    ("layers_to_transform", 1.5),
    ("layers_to_transform", ["0"]),
    ("layer_replication", [[0.0, 1.0]]),
    ("layer_replication", [[0]]),
    ("layer_replication", [["a", "b"]]),
    ("modules_to_save", [1]),
    ("target_modules", [1]),
    ("init_lora_weights", 5),
    ("init_lora_weights", None),
    ("trainable_token_indices", {"e": ["a"]}),
    ("trainable_token_indices", {"e": 1.5}),
]
BYTES: list[tuple[str, Any]] = [("target_modules", b"q"), ("rank_pattern", {b"q": 4})]  # JSON has none


@pytest.mark.parametrize(
    ("field", "value", "by"),
    [*((*row, by) for by in ("keyword", "file") for row in WRONG_TYPES), *((*row, "keyword") for row in BYTES)],
    ids=short,
)
def test_a_value_of_the_wrong_type_is_refused_where_it_is_given(
    field: str, value: Any, by: str, tmp_path: Path
) -> None:
    values = saved(QLoRAConfig(), tmp_path)
    (values["hf_qlora"]["originals"] if field == "use_rslora" else values)[field] = value
    if by == "file":
        write(tmp_path, values)
    with pytest.raises(ConfigError, match=field):
        QLoRAConfig(**{field: value}) if by == "keyword" else PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "mica"])
def test_an_initialisation_that_changes_the_base_is_refused_on_nf4(init: str) -> None:
    with pytest.raises(ConfigError) as error:
        QLoRAConfig(init_lora_weights=init)
    message = str(error.value)
    assert repr(init) in message  # what was given
    assert "NF4" in message  # why not
    assert "base" in message
    assert "'loftq'" in message  # what is allowed
    assert "quantization=None" in message
    ours = QLoRAConfig(init_lora_weights=init, quantization=None)
    stock = LoraConfig(init_lora_weights=init)
    assert vars(ours).items() >= vars(stock).items()


@pytest.mark.parametrize(
    "loftq_config",
    [
        {"loftq_iter": 2},
        {"loftq_iter": 0},
        {"loftq_bits": 8},
        {"loftq_bits": 4, "loftq_iter": 5},
        peft.LoftQConfig(loftq_iter=3),
    ],
)
def test_more_loftq_iterations_are_refused_on_nf4(loftq_config: Any) -> None:
    with pytest.raises(ConfigError) as error:
        QLoRAConfig(init_lora_weights="loftq", loftq_config=loftq_config)
    given = loftq_config if isinstance(loftq_config, dict) else vars(loftq_config)
    assert all(str(value) in str(error.value) for value in given.values())
    assert "change the base" in str(error.value)
    assert "loftq_iter=1" in str(error.value)


@pytest.mark.parametrize("loftq_config", ["four", 4, ["loftq_iter"], True])
def test_a_loftq_config_of_the_wrong_type_is_refused(loftq_config: Any) -> None:
    with pytest.raises(ConfigError, match="loftq_config"):
        QLoRAConfig(init_lora_weights="loftq", loftq_config=loftq_config)


@pytest.mark.parametrize(
    "loftq_config",
    [None, {}, {"loftq_bits": 4}, {"loftq_bits": 4, "loftq_iter": 1}, peft.LoftQConfig(loftq_bits=4, loftq_iter=1)],
)
def test_one_loftq_iteration_is_accepted_on_nf4_without_scipy(loftq_config: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(lora_config.importlib.util, "find_spec", lambda name: None)
    config = QLoRAConfig(init_lora_weights="loftq", loftq_config=loftq_config)
    assert config.init_lora_weights == "loftq"
    assert QLoRAConfig(**config.to_dict()) == config


@pytest.mark.parametrize("installed", [True, False])
def test_loftq_without_quantization_is_pefts_own(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = object() if installed else None
    monkeypatch.setattr(lora_config.importlib.util, "find_spec", lambda name: spec)
    loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8, "loftq_iter": 5}}
    if installed:
        assert vars(QLoRAConfig(**loftq, quantization=None)).items() >= vars(LoraConfig(**loftq)).items()
    else:
        with pytest.raises(ImportError, match="scipy"):
            QLoRAConfig(**loftq, quantization=None)


VARIANTS: dict[str, Any] = {
    "velora_config": lora_config.VeloraConfig(),
    "monteclora_config": lora_config.MontecloraConfig(),
    "kasa_config": lora_config.KasaConfig(),
    "use_bdlora": lora_config.BdLoraConfig(),
    "use_qalora": True,
    "megatron_config": {"hidden_size": 8},
}


@pytest.mark.parametrize("field", VARIANTS)
def test_a_variant_that_a_4_bit_layer_ignores_is_refused_on_nf4(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field}.*NF4.*quantization=None"):
        QLoRAConfig(**{field: VARIANTS[field]})
    assert getattr(QLoRAConfig(**{field: VARIANTS[field]}, quantization=None), field) == VARIANTS[field]


@pytest.mark.parametrize("field", [name for name, value in VARIANTS.items() if dataclasses.is_dataclass(value)])
def test_a_variant_with_default_settings_is_refused_on_nf4_too(field: str) -> None:
    """PEFT makes its config out of an empty dict, as a file may hold one."""
    assert QLoRAConfig(**{field: {}}, quantization=None) == QLoRAConfig(**{field: VARIANTS[field]}, quantization=None)
    with pytest.raises(ConfigError, match=field):
        QLoRAConfig(**{field: {}})


# ── QLoRAConfig: LoRA's own fields ───────────────────────────────────────────────────────────────────────────────────

# A value other than the default for every field of LoraConfig.
FIELDS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "auto_mapping": {"base_model_class": "X", "parent_library": "transformers"},
    "peft_version": "0.21.0",
    "base_model_name_or_path": "some/base",
    "revision": "main",
    "inference_mode": True,
    "r": 4,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["k_proj"],
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "use_rslora": True,
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "gaussian",
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"v_proj": 3},
    "megatron_config": {"hidden_size": 8},
    "megatron_core": "megatron.other",
    "trainable_token_indices": [1, 2],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": peft.EvaConfig(rho=3.0),
    "corda_config": lora_config.CordaConfig(),
    "lora_ga_config": lora_config.LoraGAConfig(stable_gamma=8),
    "use_dora": True,
    "velora_config": VARIANTS["velora_config"],
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "qalora_group_size": 8,
    "monteclora_config": VARIANTS["monteclora_config"],
    "layer_replication": [(0, 2), (1, 2)],
    "runtime_config": peft.LoraRuntimeConfig(ephemeral_gpu_offload=True),
    "lora_bias": True,
    "target_parameters": ["experts.gate_up_proj"],
    "use_bdlora": VARIANTS["use_bdlora"],
    "arrow_config": lora_config.ArrowConfig(top_k=2),
    "kasa_config": VARIANTS["kasa_config"],
    "ensure_weight_tying": True,
}
NEEDED = {  # what a field is refused or ignored without
    "layers_pattern": {"layers_to_transform": [0], "target_modules": ["q_proj"]},
    "loftq_config": {"init_lora_weights": "loftq"},
    "eva_config": {"init_lora_weights": "eva"},
    "corda_config": {"init_lora_weights": "corda", "quantization": None},
    "lora_ga_config": {"init_lora_weights": "lora_ga", "quantization": None},
    "alora_invocation_tokens": {"task_type": "CAUSAL_LM"},
    **{name: {"quantization": None} for name in VARIANTS},
}


def test_every_field_of_peft_has_a_value_in_these_tests() -> None:
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(LoraConfig)} - {"peft_type"}


@pytest.mark.parametrize("field", FIELDS)
def test_every_lora_field_is_accepted_and_kept_as_peft_keeps_it(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_config.importlib.util, "find_spec", lambda name: object())  # scipy
    options = {**NEEDED.get(field, {}), field: FIELDS[field]}
    stock = LoraConfig(**{name: value for name, value in options.items() if name != "quantization"})
    ours = QLoRAConfig(**options)
    assert {name: value for name, value in vars(ours).items() if name in vars(stock)} == vars(stock)
    assert getattr(ours, field) != getattr(LoraConfig(), field)  # the value says something


@pytest.mark.parametrize(
    "options",
    [
        {"r": 2, "lora_alpha": 3},
        {"target_modules": r".*\.(q|up)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
        {"lora_dropout": 0.5},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.": 5}},
        {"modules_to_save": ["lm_head"]},
        *(
            {"init_lora_weights": init}
            for init in (False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora")
        ),
        {"layers_to_transform": 1},
        {"layers_to_transform": [0], "layers_pattern": ["layers"]},
        {"trainable_token_indices": {"embed_tokens": [1, 3]}},
        {"use_dora": True},
        {"lora_bias": True},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"target_parameters": ["q_proj.weight"], "target_modules": []},
        {"kasa_config": VARIANTS["kasa_config"]},
        {"velora_config": VARIANTS["velora_config"]},
    ],
    ids=str,
)
def test_without_quantization_it_is_stock_lora_bit_for_bit(options: dict[str, Any]) -> None:
    """Same seed, same model: the same tensors under the same names, the same trainable ones, the same output."""
    ids, results = tokens(), []
    for make in (LoraConfig, lambda **given: QLoRAConfig(**given, quantization=None)):
        config = make(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})
        base = small_llama()
        torch.manual_seed(1)
        model = get_peft_model(base, config).train()
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        torch.manual_seed(2)
        results.append((trainable, model.state_dict(), model(input_ids=ids).logits))
    (names, tensors, logits), (own_names, own_tensors, own_logits) = results
    assert own_names == names
    assert own_tensors.keys() == tensors.keys()
    assert all(torch.equal(own_tensors[name], tensors[name]) for name in tensors)
    assert torch.equal(own_logits, logits)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "loftq", "eva"])
def test_an_initialisation_can_be_used_on_nf4_or_is_refused_and_not_advised(init: bool | str) -> None:
    options = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": init}
    if kind_of_error(lambda: QLoRAConfig(**options)) is ConfigError:
        with pytest.raises(ConfigError) as error:
            QLoRAConfig(init_lora_weights="pissa")
        assert repr(init) not in str(error.value)
        return
    model = get_peft_model(small_llama(), QLoRAConfig(**options))
    model(input_ids=tokens()).logits.sum().backward()
    found = [parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name]
    assert all(grad is not None and grad.isfinite().all() for grad in found)


def test_two_configs_share_nothing() -> None:
    one, two = QLoRAConfig(), QLoRAConfig()
    one.rank_pattern["q"] = 2
    one.alpha_pattern["q"] = 2
    assert two.rank_pattern == two.alpha_pattern == {}


def test_patterns_given_as_none_are_empty() -> None:
    config = QLoRAConfig(rank_pattern=None, alpha_pattern=None)
    assert config.rank_pattern == config.alpha_pattern == {}


# ── There and back ───────────────────────────────────────────────────────────────────────────────────────────────────

NATIVE = {
    "r": 4,
    "lora_alpha": 12,
    "target_modules": ["v", "q"],
    "use_rslora": True,
    "rank_pattern": {"q": 2},
    "alpha_pattern": {"v": 3, r"^q$": 2.5},
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "some/base",
    "modules_to_save": ["head"],
}
COMPOSITE = {
    "native": NATIVE,
    "not portable": {**NATIVE, "portable": False},
    "dense": {**NATIVE, "quantization": None},
    "quantization": {"quantization": NF4Config(False, 128, "bfloat16", ("a.b",)), "target_modules": ".*q"},
    "as a dict": {"quantization": {"block_size": 32, "compute_dtype": "float16"}},
    "default": {},
}


@pytest.mark.parametrize("name", COMPOSITE)
@pytest.mark.parametrize("reader", READERS)
def test_a_config_comes_back_from_its_file(name: str, reader: type[PeftConfig], tmp_path: Path) -> None:
    config = QLoRAConfig(**COMPOSITE[name])
    config.save_pretrained(tmp_path)
    again = reader.from_pretrained(tmp_path)
    assert type(again) is QLoRAConfig
    assert again == config
    for field in ("use_rslora", "alpha_pattern", "rank_pattern", "quantization", "portable", "target_modules"):
        assert getattr(again, field) == getattr(config, field)


@pytest.mark.parametrize("name", COMPOSITE)
def test_a_config_comes_back_from_its_dict(name: str) -> None:
    config = QLoRAConfig(**COMPOSITE[name])
    for values in (config.to_dict(), json.loads(json.dumps(config.to_dict()))):
        assert QLoRAConfig(**values) == config


@pytest.mark.parametrize("name", COMPOSITE)
@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config)), dataclasses.replace],
    ids=["copy", "deepcopy", "pickle", "replace"],
)
def test_a_copied_config_is_equal_and_of_its_class(
    name: str, from_file: bool, duplicate: Callable[[Any], Any], tmp_path: Path
) -> None:
    config = QLoRAConfig(**COMPOSITE[name])
    if from_file:
        config.save_pretrained(tmp_path)
        config = QLoRAConfig.from_pretrained(tmp_path)
    again = duplicate(config)
    assert type(again) is QLoRAConfig
    assert again == config
    assert again is not config
    # Where it was read from decides how its tensors are taken: a copy that forgot would scale a folded adapter twice.
    assert again.record == config.record


def test_a_replaced_field_is_checked() -> None:
    config = QLoRAConfig(**NATIVE)
    assert dataclasses.replace(config, r=2).r == 2
    assert dataclasses.replace(config, quantization=None).quantization is None
    with pytest.raises(ConfigError, match="r=0"):
        dataclasses.replace(config, r=0)


@pytest.mark.parametrize("init", ["gaussian", "loftq", False])
def test_the_initialisation_is_remembered_but_not_repeated(init: bool | str, tmp_path: Path) -> None:
    """PEFT initialises before it loads: a saved adapter must not run LoftQ again, but says what it began as."""
    config = QLoRAConfig(init_lora_weights=init)
    once = saved(config, tmp_path)
    assert once["init_lora_weights"] is True
    assert once["hf_qlora"]["originals"]["init_lora_weights"] == init
    again = QLoRAConfig.from_pretrained(tmp_path)
    assert again.init_lora_weights is True
    assert saved(again, tmp_path) == once


@pytest.mark.parametrize("reader", [PeftConfig.from_pretrained, lambda folder: LoraConfig(**stock_part(folder))])
def test_peft_has_nothing_to_say_about_a_file_of_ours(reader: Callable[[Path], Any], tmp_path: Path) -> None:
    QLoRAConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=3.0)).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader(tmp_path)


names = st.text("abq_.", min_size=1, max_size=6).filter(lambda text: text.strip("."))
positive = st.integers(1, 4096)


@st.composite
def configs(draw: st.DrawFn) -> QLoRAConfig:
    """Any config that a user may write."""
    nf4 = st.builds(
        NF4Config,
        double_quant=st.booleans(),
        block_size=st.sampled_from(BLOCK_SIZES),
        compute_dtype=st.sampled_from([None, "bfloat16", torch.float16, "torch.float32"]),
        skip_modules=st.lists(names, max_size=3).map(tuple),
    )
    lists = st.lists(names, max_size=3)
    alphas = st.one_of(positive, st.floats(1e-3, 1e3))
    fields = {
        "r": positive,
        "lora_alpha": alphas,
        "lora_dropout": st.floats(0, 0.99),
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "rank_pattern": st.dictionaries(names, positive, max_size=3),
        "alpha_pattern": st.dictionaries(names, alphas, max_size=3),
        "target_modules": st.one_of(st.none(), lists, st.sampled_from(["all-linear", ".*q", "(a|b)"])),
        "exclude_modules": st.one_of(st.none(), lists, st.just(".*q")),
        "modules_to_save": st.one_of(st.none(), lists),
        "trainable_token_indices": st.one_of(
            st.none(),
            st.lists(positive, max_size=3),
            st.dictionaries(names, st.lists(positive, max_size=3), max_size=2),
        ),
        "task_type": st.sampled_from([None, *peft.TaskType]),
        "quantization": st.one_of(st.none(), nf4),
        "portable": st.booleans(),
    }
    return QLoRAConfig(**draw(st.fixed_dictionaries({}, optional=fields)))


@given(configs())
@settings(max_examples=60, deadline=None, database=None)
def test_whatever_is_configured_comes_back(config: QLoRAConfig) -> None:
    assert QLoRAConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        assert [reader.from_pretrained(folder) for reader in READERS] == [config] * len(READERS)


# ── On disk ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_file_is_that_of_a_stock_lora_with_plain_scaling(tmp_path: Path) -> None:
    values = saved(QLoRAConfig(**NATIVE), tmp_path)
    record = values.pop("hf_qlora")
    assert values["peft_type"] == "LORA"
    assert (values["use_rslora"], values["alpha_pattern"], values["init_lora_weights"]) == (False, {}, True)
    assert (values["r"], values["lora_alpha"], values["rank_pattern"]) == (4, 12, {"q": 2})
    assert values.keys() == LoraConfig().to_dict().keys()  # nothing that a stock reader would not know
    assert record["originals"]["use_rslora"] is True
    assert record["originals"]["alpha_pattern"] == NATIVE["alpha_pattern"]


def test_a_file_that_is_not_portable_says_the_native_scaling(tmp_path: Path) -> None:
    values = saved(QLoRAConfig(**NATIVE, portable=False), tmp_path)
    assert (values["use_rslora"], values["alpha_pattern"]) == (True, NATIVE["alpha_pattern"])
    assert values["hf_qlora"]["portable"] is False


@pytest.mark.parametrize("name", COMPOSITE)
def test_portable_form_is_what_a_stock_reader_makes_of_the_file(name: str, tmp_path: Path) -> None:
    config = QLoRAConfig(**COMPOSITE[name])
    config.save_pretrained(tmp_path)
    assert type(config.portable_form()) is LoraConfig
    assert config.portable_form() == LoraConfig(**stock_part(tmp_path))
    assert config == QLoRAConfig(**COMPOSITE[name])  # asking changed nothing


def test_the_portable_form_scales_by_alpha_over_r() -> None:
    portable = QLoRAConfig(**{**NATIVE, "task_type": None, "modules_to_save": None}).portable_form()
    layers = [m for m in get_peft_model(Block(), portable).modules() if isinstance(m, LoraLayer)]
    assert [layer.scaling["default"] for layer in layers] == [12 / 2, 12 / 4]  # q has rank 2


def test_become_portable_gives_up_the_native_scaling_only_where_it_was_folded() -> None:
    folded, native = QLoRAConfig(**NATIVE), QLoRAConfig(**NATIVE, portable=False)
    folded, native = folded.with_portable_scaling(), native.with_portable_scaling()
    assert (folded.use_rslora, folded.alpha_pattern) == (False, {})
    assert native == QLoRAConfig(**NATIVE, portable=False)


def test_the_file_is_the_golden_one(tmp_path: Path) -> None:
    """An adapter saved today is read by every later version: what the file says may grow, not change."""
    golden, written = read(GOLDEN.parent), saved(golden_config(), tmp_path)
    golden_record, record = golden.pop("hf_qlora"), written.pop("hf_qlora")
    golden_originals, originals = golden_record.pop("originals"), record.pop("originals")
    assert written.items() >= golden.items()
    assert record.items() >= golden_record.items()
    assert originals.items() >= golden_originals.items()


def test_the_golden_file_is_read() -> None:
    config = PeftConfig.from_pretrained(GOLDEN.parent)
    assert config == golden_config()
    assert config.record == read(GOLDEN.parent)["hf_qlora"]


def golden_config() -> QLoRAConfig:
    return QLoRAConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=["up_proj", "q_proj"],
        task_type="CAUSAL_LM",
        use_rslora=True,
        rank_pattern={"q_proj": 8},
        alpha_pattern={r"layers\.0\.": 64},
        base_model_name_or_path="some/base",
        inference_mode=True,
        peft_version="0.21.0",
        quantization=NF4Config(compute_dtype="bfloat16"),
    )


def test_the_file_is_deterministic(tmp_path: Path) -> None:
    """A set has no order of its own: the same config must give the same bytes."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    texts = []
    for order in (targets, targets[::-1]):
        QLoRAConfig(target_modules=order, exclude_modules=order).save_pretrained(tmp_path)
        texts.append((tmp_path / "adapter_config.json").read_bytes())
    assert texts[0] == texts[1]


def test_the_auto_mapping_is_written(tmp_path: Path) -> None:
    mapping = {"base_model_class": "Block", "parent_library": "somewhere"}
    QLoRAConfig().save_pretrained(tmp_path, auto_mapping_dict=mapping)
    assert read(tmp_path)["auto_mapping"] == mapping
    assert QLoRAConfig.from_pretrained(tmp_path).auto_mapping == mapping


def test_a_config_is_not_saved_into_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="is a file; pass a folder"):
        QLoRAConfig().save_pretrained(file)
    assert file.read_text() == "mine"


def test_a_failed_write_leaves_the_old_config_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved(QLoRAConfig(r=2), tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(record_module.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            QLoRAConfig(r=4).save_pretrained(tmp_path)
    unwritable = QLoRAConfig(r=4)
    unwritable.revision = object()  # type: ignore[assignment]
    with pytest.raises(TypeError):
        unwritable.save_pretrained(tmp_path)
    assert read(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


# ── Files that are not ours, or not right ────────────────────────────────────────────────────────────────────────────


def test_a_stock_file_stays_stock(tmp_path: Path) -> None:
    LoraConfig(r=2).save_pretrained(tmp_path)
    for reader in READERS:
        assert type(reader.from_pretrained(tmp_path)) is LoraConfig


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, FORMAT_VERSION + 10**6])
def test_a_newer_format_is_refused(version: int, tmp_path: Path) -> None:
    values = saved(QLoRAConfig(), tmp_path)
    values["hf_qlora"] |= {"format_version": version, "type": "SomethingNew", "originals": "elsewhere"}
    for reader in READERS:
        with pytest.raises(ConfigError, match=rf"format_version {version}.*up to {FORMAT_VERSION}.*Upgrade hf-qlora"):
            reader.from_pretrained(write(tmp_path, values))


@pytest.mark.parametrize("name", ["AdaptiveNothingConfig", "LoraConfig", "os.system", "builtins.exec", ""])
def test_an_unknown_config_type_is_refused(name: str, tmp_path: Path) -> None:
    values = saved(QLoRAConfig(), tmp_path)
    values["hf_qlora"]["type"] = name
    with pytest.raises(ConfigError, match=rf"{name!r}.*'QLoRAConfig'.*Upgrade hf-qlora"):
        PeftConfig.from_pretrained(write(tmp_path, values))


def test_a_subclass_comes_back_as_itself(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Other(QLoRAConfig):
        pass

    Other(r=3).save_pretrained(tmp_path)
    assert read(tmp_path)["hf_qlora"]["type"] == "Other"
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is Other
    assert again == Other(r=3)


@pytest.mark.parametrize("reader", READERS)
def test_keys_of_a_newer_peft_are_named_and_ignored(
    reader: type[PeftConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    qlora._say_once.cache_clear()
    values = saved(QLoRAConfig(r=2), tmp_path)
    with caplog.at_level(logging.WARNING, logger="hf_qlora"):
        config = reader.from_pretrained(write(tmp_path, values | {"use_quora": True, "aurora_level": 3}))
    assert config == QLoRAConfig(r=2)
    [message] = caplog.messages
    assert "['aurora_level', 'use_quora']" in message
    assert "Upgrade peft" in message


def test_keys_of_a_newer_minor_version_of_ours_are_ignored(tmp_path: Path) -> None:
    values = saved(QLoRAConfig(r=2), tmp_path)
    values["hf_qlora"]["a_key_of_tomorrow"] = {"of": "the base"}
    assert PeftConfig.from_pretrained(write(tmp_path, values)) == QLoRAConfig(r=2)


def test_own_settings_are_read_from_the_record_only(tmp_path: Path) -> None:
    values = saved(QLoRAConfig(), tmp_path)
    config = PeftConfig.from_pretrained(write(tmp_path, values | {"quantization": None, "portable": False}))
    assert config == QLoRAConfig()


@pytest.mark.parametrize("peft_type", ["LOHA", "lora", None, 1, [], "NOTHING"])
def test_another_peft_type_with_our_record_is_refused(peft_type: Any, tmp_path: Path) -> None:
    values = saved(QLoRAConfig(), tmp_path) | {"peft_type": peft_type}
    with pytest.raises(ConfigError, match=r"peft_type=.* must be 'LORA'"):
        PeftConfig.from_pretrained(write(tmp_path, values))


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"not json",
        b'{"peft_type": "LORA",}',
        b"\xff\xfe\x00{",
        bytes(range(256)),
        b"\x00" * 64,
        b"\xef\xbb\xbf{}",
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_a_config_that_is_not_json_is_refused_and_named(
    content: bytes, reader: type[PeftConfig], tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON"):
        reader.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"LORA"', "true", '["hf_qlora"]', '"hf_qlora"'])
def test_a_config_that_is_no_object_is_refused_and_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"adapter_config\.json is not an adapter config.*not an object"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [DEEP, '{"hf_qlora": ' + '{"a":' * 100_000, '{"r": ' + "9" * 5000 + "}"])
def test_a_config_that_no_parser_survives_is_refused_and_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftConfig.from_pretrained(tmp_path)


def change(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        values = values[name]
    values[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("hf_qlora", value) for value in (None, [], 3, "x", {}, True)),
        *(("hf_qlora.format_version", value) for value in (None, 0, -1, True, "1", 1.0, [])),
        *(("hf_qlora.type", value) for value in (None, 3, [], {})),
        *(("hf_qlora.originals", value) for value in (None, [], "x", {}, {"use_rslora": True})),
        *(("hf_qlora.originals.use_rslora", value) for value in (None, 1, "true")),
        *(
            ("hf_qlora.originals.alpha_pattern", value)
            for value in (None, [], {"q": 0}, {"(": 1}, {"q": "x"}, {"q": HUGE})
        ),
        *(("hf_qlora.originals.init_lora_weights", value) for value in (None, 3, [])),
        *(("hf_qlora.quantization", value) for value in (3, "nf4", [], True, {"block_size": 3}, {"bits": 4})),
        *(("hf_qlora.portable", value) for value in (None, 1, "x")),
        *(("r", value) for value in (0, -4, 2.5, "8", None, True, [8], HUGE)),
        *(("lora_alpha", value) for value in (0, "x", None, HUGE)),
        *(("lora_dropout", value) for value in (1, -0.5, "x", None)),
        *(("target_modules", value) for value in ("(", 3, [3], {"q": 1}, OVERLONG, OVERDEEP)),
        *(("rank_pattern", value) for value in ({"q": -1}, {"(": 4}, [], {"q": HUGE}, {OVERLONG: 4}, {OVERDEEP: 4})),
        *(("task_type", value) for value in ("NONSENSE", 3, [])),
        *(("bias", value) for value in ("sometimes", None, 3, [])),
        *(("init_lora_weights", value) for value in ("pissa", None, 3, [], {})),
        *(("modules_to_save", value) for value in ("head", 3, [3])),
        *(("eva_config", value) for value in (3, {"rho": 0.1})),
        *(("use_dora", value) for value in (None, 1, "x")),
        ("layers_to_transform", "x"),
        ("velora_config", {"x": 1}),
    ],
    ids=short,
)
def test_a_wrong_value_in_a_file_is_refused_and_named(path: str, value: Any, tmp_path: Path) -> None:
    values = saved(QLoRAConfig(target_modules=["q"]), tmp_path)
    change(values, path, value)
    with pytest.raises(ConfigError, match=r"adapter_config\.json") as error:
        PeftConfig.from_pretrained(write(tmp_path, values))
    blamed = (path.rpartition(".")[2], "block_size", "bits", "Invalid task type", "EvaConfig", "rho")
    assert any(word in str(error.value) for word in blamed)


# ── Property tests ───────────────────────────────────────────────────────────────────────────────────────────────────

NASTY = st.sampled_from(
    [
        *(None, True, -1, 0, 1, 2, 1.5, math.nan, math.inf, HUGE, "", "q", "(", OVERLONG, OVERDEEP, "\ud800"),
        *([], [1], ["q"], [[0, 1]], [[0.0, 1.0]], {}, {"q": 1}, {"q": HUGE}, {"q": [1]}, {"e": ["q"]}, {"(": 2}),
        *(
            {OVERLONG: 2},
            {"rho": "x"},
            "all-linear",
            "loftq",
            "pissa",
            "pissa_niter_4",
            "eva",
            "orthogonal",
            "SEQ_CLS",
        ),
    ]
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-2, 70), st.integers(), st.floats(), st.text(max_size=6))
JSON = st.one_of(
    NASTY,
    st.recursive(
        SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.one_of(st.text(max_size=4), st.sampled_from(["q", "v", "e"])), inner, max_size=3),
        ),
        max_leaves=5,
    ),
)
VALID = {
    **LoraConfig(peft_version="0.21.2").to_dict(),
    **{"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"], "rank_pattern": {"v": 2}, "peft_type": "LORA"},
    "hf_qlora": {
        "format_version": 1,
        "type": "QLoRAConfig",
        "quantization": NF4Config().to_dict(),
        "portable": True,
        "originals": {
            "use_rslora": True,
            "alpha_pattern": {"q": 3},
            "init_lora_weights": "loftq",
            "loftq_config": {},
        },
    },
}


def paths(values: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every value in nested dicts."""
    for name, value in values.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, name))


CHECKED = [
    *(("r",), ("lora_alpha",), ("lora_dropout",), ("target_modules",), ("rank_pattern",), ("layers_to_transform",)),
    *(("init_lora_weights",), ("hf_qlora", "quantization"), ("hf_qlora", "originals", "alpha_pattern")),
]


@st.composite
def mutations(draw: st.DrawFn) -> dict[str, Any]:
    """A valid file with up to three keys dropped or given any JSON value; our record stays in some form."""
    values: dict[str, Any] = copy.deepcopy(VALID)
    if draw(st.booleans()):
        values["hf_qlora"]["quantization"] = None
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        path = draw(st.one_of(st.sampled_from(list(paths(values))), st.sampled_from(CHECKED)))
        parent: Any = values
        for name in path[:-1]:
            parent = parent.get(name) if isinstance(parent, dict) else None
        if not isinstance(parent, dict):
            continue  # an earlier mutation took it
        if path != ("hf_qlora",) and draw(st.integers(0, 3)) == 0:
            parent.pop(path[-1], None)
        else:
            parent[path[-1]] = draw(JSON)
    if draw(st.integers(0, 9)) == 0:
        values[draw(st.text(max_size=5))] = draw(JSON)
    return values


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What PEFT and re have to say of nonsense is not the subject."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def kind_of_error(call: Callable[[], Any]) -> type[BaseException] | None:
    try:
        call()
    except Exception as error:
        return type(error)
    return None


def fuzzed(**strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a property on a few hundred examples, the same in every run; under `-m slow` on thousands of new ones."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("examples", [300, pytest.param(5000, marks=pytest.mark.slow)])
        def test(examples: int) -> None:
            options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
            settings(max_examples=examples, derandomize=examples == 300, **options)(given(**strategies)(check))()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


@fuzzed(values=mutations())
def test_any_config_file_is_loaded_or_refused_by_our_error(values: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder, quiet():
        write(Path(folder), values)
        try:
            config, message = PeftConfig.from_pretrained(folder), ""
        except ConfigError as refusal:
            config, message = None, str(refusal)
    assert isinstance(config, QLoRAConfig) if config is not None else "adapter_config.json" in message


@fuzzed(values=mutations())
def test_a_loaded_config_makes_a_model_or_fails_as_stock_peft_fails(values: dict[str, Any]) -> None:
    """Once a config has been accepted, the base is not the place to find that a value makes no sense.

    What stock PEFT refuses by another error of its own, on a dense base, is not ours to rename.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        write(Path(folder), values)
        if kind_of_error(lambda: PeftConfig.from_pretrained(folder)) is not None:
            return  # the property above
        config = PeftConfig.from_pretrained(folder)
        stock = LoraConfig(**{name: getattr(config, name) for name in FIELDS})
        found = kind_of_error(lambda: get_peft_model(Block(), config))
        if found is not None and not issubclass(found, ValueError):
            assert kind_of_error(lambda: get_peft_model(Block(), stock)) is found


KEYWORDS = st.dictionaries(st.sampled_from([*FIELDS, "quantization", "portable"]), JSON, max_size=2)


@fuzzed(options=KEYWORDS)
def test_any_keywords_are_accepted_or_refused_as_clearly_as_by_peft(options: dict[str, Any]) -> None:
    with quiet():
        found = kind_of_error(lambda: QLoRAConfig(**options))
        if found is not None and not issubclass(found, ValueError):
            stock = {name: value for name, value in options.items() if name not in ("quantization", "portable")}
            assert kind_of_error(lambda: LoraConfig(**stock)) is found


@fuzzed(options=KEYWORDS)
def test_whatever_is_accepted_can_be_saved_and_loaded(options: dict[str, Any]) -> None:
    """An adapter that trains for a day and cannot be loaded is lost: what a file may not say is refused at once."""
    with quiet():
        if kind_of_error(lambda: QLoRAConfig(**options)) is not None:
            return  # the property above
        config = QLoRAConfig(**options)
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            again = PeftConfig.from_pretrained(folder)
        assert again.portable_form() == config.portable_form()


@pytest.mark.parametrize("quantization", [NF4Config().to_dict(), None], ids=["nf4", "dense"])
@pytest.mark.parametrize("init", ["loftq", "nonsense", "pissa_niter_x"])
def test_an_initialisation_in_a_file_needs_nothing_that_is_not_there(
    init: str, quantization: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT asks for scipy where a config says LoftQ, and the tensors of a saved adapter follow anyway."""
    monkeypatch.setattr(lora_config.importlib.util, "find_spec", lambda name: None)
    values = saved(QLoRAConfig(target_modules=["q"]), tmp_path) | {"init_lora_weights": init}
    values["hf_qlora"]["quantization"] = quantization
    write(tmp_path, values)
    assert kind_of_error(lambda: PeftConfig.from_pretrained(tmp_path)) in (None, ConfigError)


@pytest.mark.parametrize("patterns", [[r"(\w+)+x\d"], [rf".*.*.*x{i}" for i in range(1000)]], ids=["one", "many"])
def test_a_slow_pattern_of_ones_own_is_a_warning_and_in_a_file_refused(
    patterns: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = QLoRAConfig(rank_pattern=dict.fromkeys(patterns, 4))
    assert [r.getMessage() for r in caplog.records if "may be slow, and files with it are refused" in r.getMessage()]
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"rank_pattern: the regular expression .* is refused"):
        PeftConfig.from_pretrained(tmp_path)


# Checkpointing


@pytest.mark.parametrize(
    "value",
    [
        *(None, "full", "offload", {"chunk_size": 4}),
        *({"mode": "budget", "budget_bytes": size} for size in (10, "4GiB")),
    ],
)
def test_checkpointing_is_under_our_key_and_comes_back(value: Any, tmp_path: Path) -> None:
    config = QLoRAConfig(r=4, checkpointing=value)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "checkpointing" not in saved
    assert saved["hf_qlora"]["checkpointing"] == value
    assert PeftConfig.from_pretrained(tmp_path).checkpointing == value
    assert QLoRAConfig(**config.to_dict()).checkpointing == value


@pytest.mark.parametrize(
    "value",
    ["ful", {"mode": "ful"}, {"mode": "budget"}, {"budget_bytes": 3}, {"chunk_size": 0}, {"rows": 3}, 4, ["full"]],
)
def test_checkpointing_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="checkpointing"):
        QLoRAConfig(r=4, checkpointing=value)
