"""A checkpointed model learns what one that is not learns, bit for bit, and holds what it was allowed to."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, VOCAB, Architecture, gpt2, llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_qlora import AdaptiveDepthLoRAConfig, QLoRAConfig, disable_checkpointing, enable_checkpointing
from hf_qlora.layers import checkpointing, offload
from hf_qlora.layers.budget import Budget
from hf_qlora.layers.chunked_mlp import ChunkedMLP
from hf_qlora.validation import ConfigError


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

PLENTY = 2**40
MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "offload": {"mode": "offload"},
    "budget for all": {"mode": "budget", "budget_bytes": PLENTY},
    "budget for some": {"mode": "budget", "budget_bytes": 800_000},
    "budget for none": {"mode": "budget", "budget_bytes": 100_000},
}
ADAPTERS: dict[str, Any] = {
    "lora": functools.partial(QLoRAConfig, lora_dropout=0.1),
    "dora": functools.partial(QLoRAConfig, lora_dropout=0.1, use_dora=True),
    "dense": functools.partial(QLoRAConfig, lora_dropout=0.1, quantization=None),
    "depth": functools.partial(AdaptiveDepthLoRAConfig, lora_dropout=0.1, attention="concentration"),
}


def four_llamas() -> nn.Module:
    return llama(num_hidden_layers=4, attention_dropout=0.1)


def four_gpt2s() -> nn.Module:
    return gpt2(n_layer=4)  # its own dropout is 0.1


def adapted(base: nn.Module, config: Any = ADAPTERS["lora"], **options: Any) -> PeftModel:
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(1)
    model = get_peft_model(base, config(**options)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def tokens(length: int = 16, rows: int = 2) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(length))


def step(model: nn.Module, inputs: Any = None, autocast: Any = nullcontext, call: Any = None) -> dict[str, Tensor]:
    """Loss, gradients and the state of the random numbers after a forward and its backward."""
    torch.manual_seed(3)
    given = {"input_ids": tokens(), "labels": tokens()} if inputs is None else inputs
    with autocast():
        out = (model if call is None else call)(**given)
        loss = out.logits.float().square().mean() if out.loss is None else out.loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {**found, "loss": loss.detach(), "random": torch.get_rng_state()}


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(expected[name].any() for name in expected)
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def budget_of(model: nn.Module) -> Budget:
    layer = next(module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    found = layer._gradient_checkpointing_func.func.__self__
    assert isinstance(found, Budget)
    return found


def held(model: nn.Module, ids: Tensor) -> int:
    """Bytes held between a forward and its backward, when the layers have been measured."""
    model(input_ids=ids, labels=ids)
    out = model(input_ids=ids, labels=ids)
    found = budget_of(model).held
    del out
    assert budget_of(model).held == 0
    return found


# What is computed


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("make", [four_llamas, four_gpt2s], ids=["llama", "gpt2"])
def test_gradients_are_those_without(make: Callable[[], nn.Module], adapter: str) -> None:
    """With dropout of the model and of the adapter, in a first step and in one after it."""
    model = adapted(make(), ADAPTERS[adapter])
    expected = step(model)
    for settings in MODES.values():
        enable_checkpointing(model, **settings)
        for _ in range(2):
            assert_identical(step(model), expected)
    disable_checkpointing(model)
    assert_identical(step(model), expected)


@pytest.mark.parametrize(
    "architecture", [a for a in ARCHITECTURES if a.name in ("bert", "t5", "vit")], ids=lambda a: a.name
)
def test_encoders_learn_the_same(architecture: Architecture) -> None:
    model = adapted(architecture.make(), task_type=architecture.task_type, **architecture.options)
    inputs: Any = architecture.inputs()
    if architecture.name == "t5":  # checkpointed layers use no cache, and with one k and v are rounded otherwise
        inputs["use_cache"] = False
    expected = step(model, inputs)
    for settings in MODES.values():
        enable_checkpointing(model, **settings)
        for _ in range(2):
            assert_identical(step(model, inputs), expected)


def test_autocast_is_that_of_the_forward() -> None:
    """A layer that is run in bfloat16, within a forward that is not, is run again so."""

    class Inner(nn.Module):
        def __init__(self, inner: nn.Module, enabled: bool) -> None:
            super().__init__()
            self.inner, self.enabled = inner, enabled

        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
                return self.inner(x)

    model = adapted(four_llamas())
    layers = model.base_model.model.model.layers
    layers[1].mlp = Inner(layers[1].mlp, True)
    layers[2].mlp = Inner(layers[2].mlp, False)
    for outer in (nullcontext, functools.partial(torch.autocast, "cpu", torch.bfloat16)):
        disable_checkpointing(model)
        expected = step(model, autocast=outer)
        for settings in MODES.values():
            enable_checkpointing(model, **settings)
            for _ in range(2):
                assert_identical(step(model, autocast=outer), expected)


@pytest.mark.parametrize("settings", [*MODES.values(), {"mode": "full", "chunk_size": 5}], ids=[*MODES, "chunked"])
def test_without_gradients_nothing_changes(settings: dict[str, Any]) -> None:
    """In eval mode, without gradients, and while generating; nor is anything run twice."""
    model = adapted(four_llamas())
    ids = tokens()
    plain = model.eval()(ids).logits
    said = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    enable_checkpointing(model, **settings)
    calls: list[int] = []
    model.base_model.model.model.layers[3].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0), said)
    assert len(calls) == 1 + 3
    with torch.no_grad():
        model.train()(ids)
    assert len(calls) == 1 + 3 + 1
    if settings["mode"] == "budget":  # nothing was saved, which says nothing of what will be
        assert budget_of(model).rates == [None] * 4


@pytest.mark.parametrize("settings", [*MODES.values(), {"mode": "full", "chunk_size": 5}], ids=[*MODES, "chunked"])
def test_copies_and_pickles_are_checkpointed_too(settings: dict[str, Any]) -> None:
    model = adapted(llama())
    enable_checkpointing(model, **settings)
    expected = step(model)
    out = model(tokens())  # a copy has nothing of this graph
    for other in (copy.deepcopy(model.base_model.model), pickle.loads(pickle.dumps(model)).base_model.model):
        assert settings["mode"] != "budget" or budget_of(other).held == 0
        found = step(other)
        assert_identical({name: found[name.removeprefix("base_model.model.")] for name in expected}, expected)
        assert other.is_gradient_checkpointing
    del out


@pytest.mark.parametrize("mode", ["full", "budget for some", "offload"])
def test_compiled_equals_eager(mode: str) -> None:
    torch._dynamo.reset()
    model = adapted(llama(), lora_dropout=0.0)
    expected = step(model)
    enable_checkpointing(model, **MODES[mode])
    found = step(model, call=torch.compile(model, backend="aot_eager"))
    for name, gradient in expected.items():
        # float32 products, in another order where PEFT's operations stand for the node
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_no_layer_runs_twice_in_a_forward() -> None:
    """Routers' logits, which a loss is made of, are collected at each run: one of each layer, in every step."""
    architecture = next(a for a in ARCHITECTURES if a.name == "mixtral")
    model = adapted(architecture.make(), QLoRAConfig, **architecture.options)  # its experts take no dropout
    layers = len(layers_of(model))
    given = {"input_ids": tokens(), "labels": tokens(), "output_router_logits": True}
    enable_checkpointing(model, "full")
    expected = step(model, given)
    enable_checkpointing(model, "budget", budget_bytes=PLENTY)
    each, own = held(model, tokens()) // layers, tokens().numel() * model.config.hidden_size * 4
    enable_checkpointing(model, "budget", budget_bytes=each + (layers - 1) * own)
    for _ in range(3):
        assert len(model(**given).router_logits) == layers
        assert_identical(step(model, given), expected)
    assert budget_of(model).keeps


# The budget


def test_a_layer_costs_what_one_more_layer_saves() -> None:
    """Against autograd's own count, over whole models with a layer more and a layer less, without MLPs' products."""

    def saved(layers: int) -> int:
        model = adapted(llama(num_hidden_layers=layers))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                kept.append(tensor.detach())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(tokens())
        del out
        return sum(sizes.values())

    model = adapted(llama(num_hidden_layers=4))
    enable_checkpointing(model, "budget", budget_bytes=PLENTY)
    product = tokens().numel() * model.base_model.model.config.intermediate_size * 4
    assert held(model, tokens()) == 4 * (saved(4) - saved(3) - product)


def test_the_last_layers_are_kept_and_no_more_than_the_budget_is_held() -> None:
    model = adapted(four_llamas())
    enable_checkpointing(model, "budget", budget_bytes=PLENTY)
    each, own = held(model, tokens()) // 4, tokens().numel() * 128 * 4
    runs: list[int] = []
    for number, layer in enumerate(model.base_model.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    for layers in range(5):
        enable_checkpointing(model, "budget", budget_bytes=layers * each + (4 - layers) * own)
        for kept in (0, layers, layers):  # a first forward measures
            runs.clear()
            out = model(input_ids=tokens(), labels=tokens())
            assert runs == [0, 1, 2, 3]
            assert budget_of(model).held == kept * each + (4 - kept) * own
            runs.clear()
            out.loss.backward()
            assert runs == list(range(3 - kept, -1, -1))
        enable_checkpointing(model, "budget", budget_bytes=layers * each + (4 - layers) * own - (layers > 0))
        # a byte less than the layers need, so one less is kept
        assert held(model, tokens()) == (max(layers - 1, 0)) * each + min(5 - layers, 4) * own


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_lengths_may_vary(attention: str) -> None:
    """Longer sequences than any before are measured: eager attention keeps its scores, whose square grows."""
    model = adapted(llama(num_hidden_layers=4, attn_implementation=attention))
    costs = {}
    for length in (8, 64, 24):
        enable_checkpointing(model, "budget", budget_bytes=PLENTY)
        costs[length] = held(model, tokens(length)) // 4
    limit = 2 * costs[64] + 2 * tokens(64).numel() * 128 * 4
    enable_checkpointing(model, "budget", budget_bytes=limit)
    for number, length in enumerate((8, 64, 64, 8, 24)):
        out = model(input_ids=tokens(length), labels=tokens(length))
        assert budget_of(model).held <= limit
        assert budget_of(model).rates[-1] is not None
        if length == 64:  # first measured, checkpointed
            assert budget_of(model).held == (limit if number == 2 else 4 * tokens(64).numel() * 128 * 4)
        out.loss.backward()
    rows = tokens(16, rows=5)
    model(input_ids=rows, labels=rows).loss.backward()
    if attention == "sdpa":  # then a layer keeps so much for a token
        assert costs[64] / 64 == costs[8] / 8
    else:
        assert costs[64] / 64 > costs[8] / 8


def test_within_hooks_a_layer_keeps_an_mlps_product_too_and_is_measured_anew() -> None:
    """Without them it is made again of its factors."""
    model, ids = adapted(llama(num_hidden_layers=4)), tokens()
    config = model.base_model.model.config
    enable_checkpointing(model, "budget", budget_bytes=PLENTY)
    held(model, ids)
    plain: list[Any] = budget_of(model).rates
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        model(input_ids=ids, labels=ids).loss.backward()
    more = config.intermediate_size / config.hidden_size
    assert budget_of(model).rates == [rate + more for rate in plain]
    model(input_ids=ids, labels=ids).loss.backward()
    assert budget_of(model).rates == plain


def test_graphs_that_are_alive_together_share_the_budget() -> None:
    model = adapted(four_llamas())
    enable_checkpointing(model, "budget", budget_bytes=PLENTY)
    each = held(model, tokens()) // 4
    own = tokens().numel() * 128 * 4
    limit = 4 * each + 4 * own
    enable_checkpointing(model, "budget", budget_bytes=limit)
    model(tokens())
    first = model(input_ids=tokens(), labels=tokens()).loss
    assert budget_of(model).held == 4 * each
    second = model(input_ids=tokens(), labels=tokens()).loss
    assert budget_of(model).held == limit
    first.backward()
    assert budget_of(model).held == 4 * own
    del second
    assert budget_of(model).held == 0


def test_a_budget_that_is_too_small_says_the_least_that_works(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(four_llamas())
    least = 4 * tokens().numel() * 128 * 4  # four layers' inputs, float32
    enable_checkpointing(model, "budget", budget_bytes=least - 1)
    with pytest.raises(ConfigError, match=rf"2 × 16 tokens.* {least:,} bytes"):
        model(tokens())
    enable_checkpointing(model, "budget", budget_bytes=least)
    expected = step(model)
    assert "keeps a layer's" in caplog.text
    disable_checkpointing(model)
    assert_identical(step(model), expected)


@pytest.mark.parametrize("way", ["function", "config", "keywords"])
def test_a_budget_may_have_a_unit(way: str) -> None:
    settings = {"mode": "budget", "budget_bytes": "1.5MiB"}
    model = adapted(llama(), checkpointing=settings if way == "config" else None)
    if way == "function":
        enable_checkpointing(model, **settings)
    elif way == "keywords":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    assert budget_of(model).limit == 3 * 2**19


def test_what_one_layer_needs_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(four_llamas())
    enable_checkpointing(model, "budget", budget_bytes=100_000)
    step(model)
    (message,) = [record.getMessage() for record in caplog.records if "budget" in record.getMessage()]
    enough = int(message.partition("From ")[2].partition(" bytes")[0].replace(",", ""))
    for size, keeps in ((enough - 1, False), (enough, True)):
        enable_checkpointing(model, "budget", budget_bytes=size)
        step(model)
        step(model)
        assert budget_of(model).keeps is keeps


def test_a_longer_batch_is_a_warning_in_mid_run(caplog: pytest.LogCaptureFixture) -> None:
    """Not an error, hours after the start: it is checkpointed as far as it goes."""
    model = adapted(four_llamas())
    longer = {"input_ids": tokens(48), "labels": tokens(48)}
    expected = step(model, longer)
    enable_checkpointing(model, "budget", budget_bytes=4 * 2 * 40 * 128 * 4)
    step(model)
    for _ in range(2):
        assert_identical(step(model, longer), expected)
    assert caplog.text.count("the budget is exceeded") == 1


# Ways to it


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@pytest.mark.parametrize("way", ["function", "keywords", "config"])
def test_every_way_is_the_same(way: str) -> None:
    settings = {"mode": "budget", "budget_bytes": 800_000, "chunk_size": 5}
    model = adapted(four_llamas(), checkpointing=settings if way == "config" else None)
    if way == "function":
        enable_checkpointing(model, **settings)
    elif way == "keywords":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    assert budget_of(model).limit == 800_000
    assert all(
        layer.gradient_checkpointing and type(layer.mlp).__mro__[1].__name__ == "ChunkedMLP"
        for layer in layers_of(model)
    )
    step(model)
    model.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in layers_of(model))
    assert all(type(layer.mlp) is tf.models.llama.modeling_llama.LlamaMLP for layer in layers_of(model))


def test_a_misspelt_keyword_is_refused() -> None:
    model = llama()
    with pytest.raises(ConfigError, match=r"chunksize: not known beside mode.*'chunk_size'"):
        model.gradient_checkpointing_enable({"mode": "full", "chunksize": 8})
    assert not model.is_gradient_checkpointing


def test_keywords_of_transformers_mean_what_they_meant() -> None:
    model = adapted(four_llamas())
    for given in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given)
        (function,) = {layer._gradient_checkpointing_func for layer in layers_of(model)}
        assert function.func is torch.utils.checkpoint.checkpoint
        assert function.keywords == (given or {"use_reentrant": False})
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"mode": "full", "use_reentrant": True})
    (function,) = {layer._gradient_checkpointing_func for layer in layers_of(model)}
    assert function.keywords == {"use_reentrant": True}
    model.gradient_checkpointing_enable({"mode": "full"}, every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in layers_of(model)] == [True, False, True, False]


@pytest.mark.parametrize("way", ["config", "function"])
def test_enabling_without_a_mode_keeps_what_was_asked_for(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """As trainers do, and TRL's also around generation."""
    checkpointing._say_once.cache_clear()
    caplog.set_level(logging.INFO)
    settings = {"mode": "budget", "budget_bytes": 800_000, "chunk_size": 5}
    model = adapted(four_llamas(), checkpointing=settings if way == "config" else None)
    if way == "function":
        enable_checkpointing(model, **settings)

    def is_as_asked() -> bool:
        chunked = all(isinstance(layer.mlp, ChunkedMLP) for layer in layers_of(model))
        return budget_of(model).limit == 800_000 and chunked

    model.gradient_checkpointing_enable()
    assert is_as_asked()
    model.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing or isinstance(layer.mlp, ChunkedMLP) for layer in layers_of(model))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert is_as_asked()
    assert caplog.text.count("without a mode; it is") == 1
    with pytest.raises(ConfigError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    enable_checkpointing(model, "full")  # what is asked for last
    model.gradient_checkpointing_enable()
    (function,) = {layer._gradient_checkpointing_func for layer in layers_of(model)}
    assert function.func is torch.utils.checkpoint.checkpoint
    enable_checkpointing(model, **settings)
    disable_checkpointing(model)
    model.gradient_checkpointing_enable()
    assert not any(isinstance(layer.mlp, ChunkedMLP) for layer in layers_of(model))


def test_chunks_alone_are_kept_beside_what_a_trainer_enables() -> None:
    model = adapted(llama(), checkpointing={"mode": None, "chunk_size": 5})
    assert not any(layer.gradient_checkpointing for layer in layers_of(model))
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing and isinstance(layer.mlp, ChunkedMLP) for layer in layers_of(model))


def test_trainer_keeps_the_configs_mode(tmp_path: Any) -> None:
    model = adapted(four_llamas(), checkpointing={"mode": "budget", "budget_bytes": 800_000})
    arguments = tf.TrainingArguments(
        str(tmp_path), gradient_checkpointing=True, max_steps=1, report_to=[], save_strategy="no", use_cpu=True
    )
    data = [{"input_ids": row, "labels": row} for row in tokens()]
    tf.Trainer(model, arguments, train_dataset=data).train()
    assert budget_of(model).limit == 800_000
    assert budget_of(model).started


def test_functions_of_others_are_called_as_they_are() -> None:
    """A keyword of theirs may go by a name of ours, also where a mode was asked for."""
    given: list[str] = []

    def theirs(function: Any, *args: Any, mode: str) -> Any:
        given.append(mode)
        return function(*args)

    for asked in (None, "full"):
        model = adapted(llama(), checkpointing=asked)
        model.base_model.model._set_gradient_checkpointing(True, functools.partial(theirs, mode="x"))
        given.clear()
        step(model)
        assert given == ["x"] * len(layers_of(model))
    model.gradient_checkpointing_enable(offload=True)  # transformers' own
    (function,) = {layer._gradient_checkpointing_func for layer in layers_of(model)}
    assert function.func is not torch.utils.checkpoint.checkpoint
    assert function.keywords == {"use_reentrant": False}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "ful"}, "choose one of"),
        ({"mode": "budget"}, "needs both"),
        ({"budget_bytes": 10}, "needs both"),
        ({"mode": "budget", "budget_bytes": 0}, "positive number of bytes"),
        ({"mode": "budget", "budget_bytes": 2.5}, "positive number of bytes"),
        ({"mode": "budget", "budget_bytes": "5%"}, "budget_bytes='5%' must be .* as '24GiB'"),
        ({"chunk_size": True}, "positive integer"),
        ({"mode": "offload", "use_reentrant": True}, "use_reentrant=False"),
        ({"mode": "full", "preserve_rng_state": False}, "dropout masks"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], said: str) -> None:
    model = adapted(llama())
    enable_checkpointing(model, "full", chunk_size=5)
    before = [(layer.gradient_checkpointing, type(layer.mlp)) for layer in layers_of(model)]
    with pytest.raises(ConfigError, match=said):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    assert [(layer.gradient_checkpointing, type(layer.mlp)) for layer in layers_of(model)] == before


@pytest.mark.parametrize(
    ("option", "said"), [({"offload": True}, "transformers' own"), ({"every_n_layers": 2}, "both choose")]
)
def test_two_choices_of_the_same_are_refused(option: dict[str, Any], said: str) -> None:
    model = adapted(llama())
    with pytest.raises(ConfigError, match=said):
        model.gradient_checkpointing_enable({"mode": "budget", "budget_bytes": 10}, **option)


def test_models_that_cannot_are_refused_before_they_are_quantized() -> None:
    albert = next(a for a in ARCHITECTURES if a.name == "albert")
    for base, options, said in (
        (albert.make(), {"checkpointing": "full", "task_type": "SEQ_CLS"}, "does not support"),
        (
            nn.Sequential(nn.Linear(64, 64)),
            {"checkpointing": "full", "target_modules": ["0"], "task_type": None},
            "no transformers model",
        ),
    ):
        before = {name: (p.dtype, p.shape) for name, p in base.named_parameters()}
        with pytest.raises(ConfigError, match=said):
            adapted(base, **options)
        assert {name: (p.dtype, p.shape) for name, p in base.named_parameters()} == before
    with pytest.raises(ConfigError, match="no transformers model"):
        enable_checkpointing(nn.Linear(2, 2))


def test_unloading_ends_what_the_config_began() -> None:
    model = adapted(llama(), checkpointing={"mode": "full", "chunk_size": 5})
    left = model.unload()
    assert not any(layer.gradient_checkpointing for layer in layers_of(left))
    assert all(type(layer.mlp) is tf.models.llama.modeling_llama.LlamaMLP for layer in layers_of(left))


def test_an_adapter_for_inference_is_not_checkpointed(tmp_path: Any) -> None:
    adapted(llama(), checkpointing="full").save_pretrained(tmp_path)
    assert not any(x.gradient_checkpointing for x in layers_of(PeftModel.from_pretrained(llama(), tmp_path)))
    assert all(
        x.gradient_checkpointing for x in layers_of(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True))
    )


@pytest.mark.parametrize("when", ["in flight", "let go", "not at all", "later"])
def test_an_offloaded_input_that_is_changed_is_an_error(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """As autograd has it of what it saves itself. Streams are stand-ins, and copies those of the CPU."""
    empty_like = torch.empty_like
    stream = mock.MagicMock()
    monkeypatch.setattr(torch, "empty_like", lambda x, pin_memory=False, **options: empty_like(x, **options))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    offloading = offload.Offload({})
    x = torch.arange(3.0)
    offloading.streams[x.device] = stream
    weight = torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(offloading.send, offload.fetch):
        y = (weight * x).sum()
    others = [torch.ones(1) for _ in range(offload.IN_FLIGHT)]
    if when in ("in flight", "let go"):
        x.add_(1)
    if when == "let go":
        with pytest.raises(RuntimeError, match=r"\(3,\), was changed in place"):
            kept = [offloading.send(other) for other in others]
        return
    if when == "in flight":
        with pytest.raises(RuntimeError, match="changed in place"):
            y.backward()
        return
    kept = [offloading.send(other) for other in others]
    if when == "later":  # the copy is done
        x.add_(1)
    y.backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.arange(3.0))
    del kept


def test_offloading_nothing_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    offload._say_once.cache_clear()
    model = adapted(llama())
    enable_checkpointing(model, "offload")
    for _ in range(2):
        step(model)
    assert [r.levelno for r in caplog.records if "moves nothing" in r.getMessage()] == [logging.WARNING]
