"""What is wrong with a run is found, named and explained; a run that is well is left alone, to the bit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from architectures import ARCHITECTURES, Architecture, llama
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from runs import adapters, assert_identical, base, outcome, qlora, trainer
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_qlora import AdapterHealthCallback, AdaptiveDepthLoRAConfig, QLoRAConfig
from hf_qlora.layers import depth
from hf_qlora.train import findings, frozen
from hf_qlora.train.frozen import FrozenBase, frozen_tensors
from hf_qlora.train.gradients import Found, Gradients
from hf_qlora.train.report import AdapterHealthError
from hf_qlora.validation import ConfigError


AT = 3  # the step at which something goes wrong


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Before(TrainerCallback):
    """Do something to the model when a step begins, and keep the adapters of the end of the step before."""

    def __init__(self, do: Callable[[Any], None], step: int = AT) -> None:
        self.do, self.step = do, step
        self.kept: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.kept = adapters(model)
            self.do(model)


def layer(model: Any, path: str) -> Any:
    return model.get_base_model().get_submodule(path)


def watched(
    folder: Path, model: Any, *callbacks: TrainerCallback, health: AdapterHealthCallback | None = None, **options: Any
) -> tuple[Any, AdapterHealthCallback]:
    health = health or AdapterHealthCallback()
    run = trainer(model, folder, *callbacks, health, **options)
    run.train()
    return run, health


# A run that is well


@pytest.mark.parametrize("reads_each_step", [True, False])
def test_watching_changes_nothing(tmp_path: Path, reads_each_step: bool) -> None:
    options = {
        "logging_nan_inf_filter": reads_each_step,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 2,
    }
    alone = trainer(qlora(), tmp_path, **options)
    alone.train()
    run, health = watched(tmp_path, qlora(), health=AdapterHealthCallback(idle_steps=3), **options)
    assert health.problems == []
    assert_identical(outcome(run), outcome(alone))
    assert not run.model._forward_hooks
    assert not run.model._forward_pre_hooks


def test_gains_dropout_and_attention_are_well(tmp_path: Path) -> None:
    config = AdaptiveDepthLoRAConfig(
        r=4, target_modules="all-linear", lora_dropout=0.5, attention="concentration", task_type="CAUSAL_LM"
    )
    _, health = watched(tmp_path, get_peft_model(base(), config), health=AdapterHealthCallback(idle_steps=3))
    assert health.problems == []


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_every_architecture_is_well(architecture: Architecture) -> None:
    """Of Trainer's events those that matter, around a plain loop; lora_A has no gradient in the first step."""
    torch.manual_seed(0)
    config = QLoRAConfig(r=2, target_modules="all-linear", **architecture.options)
    model = get_peft_model(architecture.make(), config).train()
    health = AdapterHealthCallback(on_problem="error", idle_steps=3)
    args = SimpleNamespace(logging_nan_inf_filter=True, torch_compile=False, world_size=1)
    state, control = SimpleNamespace(global_step=0), SimpleNamespace(should_training_stop=False)
    health.on_train_begin(args, state, control, model=model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        health.on_step_begin(args, state, control)
        model(**architecture.inputs()).logits.square().mean().backward()
        health.on_pre_optimizer_step(args, state, control, model=model, optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        health.on_log(args, state, control, model=model)
    health.on_train_end(args, state, control, model=model)
    assert health.problems == []


# NaN and infinity


def poisoned(model: Any) -> None:
    layer(model, "model.layers.1.mlp").register_forward_hook(lambda module, args, output: output * float("nan"))


class _BreaksBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float("inf")


def poisoned_backward(model: Any) -> None:
    layer(model, "model.layers.1.self_attn").register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            {**kwargs, "hidden_states": _BreaksBackward.apply(kwargs["hidden_states"])},
        ),
        with_kwargs=True,
    )


def poisoned_head(model: Any) -> None:
    layer(model, "lm_head").weight.data[3] = float("inf")


def poisoned_adapter(model: Any) -> None:
    layer(model, "model.layers.0.mlp.up_proj").lora_A["default"].weight.data[0, 0] = float("nan")


NOT_FINITE = {
    "forward": (poisoned, "arose  in the forward of base_model.model.model.layers.1.mlp (LlamaMLP)"),
    "backward": (
        poisoned_backward,
        "what comes back to base_model.model.model.layers.1.input_layernorm (LlamaRMSNorm) is not",
    ),
    "head": (poisoned_head, "in the model itself: base_model.model.lm_head.weight is not finite"),
    "adapter": (
        poisoned_adapter,
        "in the model itself: base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight",
    ),
}


@pytest.mark.parametrize("kind", NOT_FINITE)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_nan_is_found_where_it_arose_and_before_the_step(
    tmp_path: Path, kind: str, optim: str, caplog: pytest.LogCaptureFixture
) -> None:
    do, words = NOT_FINITE[kind]
    before = Before(do)
    health = AdapterHealthCallback(check_base=False)
    run, _ = watched(tmp_path, qlora(), before, health=health, optim=optim, gradient_accumulation_steps=2)
    assert run.state.global_step == AT
    assert words in caplog.text
    assert f"step {AT}\n" in caplog.text
    assert "the gradient is NaN or infinite in " in caplog.text
    now = adapters(run.model)
    if kind != "adapter":
        assert_identical(now, before.kept)


class Spoil(TrainerCallback):
    """NaN in one gradient at one step, which no run of its batches repeats."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step + 1 == AT:
            next(p for p in model.parameters() if p.requires_grad).grad[0, 0] = float("nan")  # type: ignore[index]


def test_nan_that_running_again_does_not_repeat_is_said_once(tmp_path: Path) -> None:
    run, health = watched(
        tmp_path, qlora(), Spoil(), health=AdapterHealthCallback(on_problem="warn", check_base=False), max_steps=AT
    )
    (problem,) = health.problems
    assert (problem.step, run.state.global_step) == (AT, AT)
    assert problem.where.startswith("not found: run once more")
    assert health._gradients.losses == []


def test_a_loss_of_ones_own_that_cannot_be_repeated_is_said(tmp_path: Path) -> None:
    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        logits = model(input_ids=inputs["input_ids"]).logits
        return logits.float().mean() * float("nan")

    run = trainer(qlora(), tmp_path, health := AdapterHealthCallback(check_base=False))
    run.compute_loss = compute_loss
    run.train()
    assert run.state.global_step == 1
    assert "could not be repeated, as the model returns no loss" in health.problems[0].where


def test_an_error_while_looking_for_the_origin_takes_no_report_away(tmp_path: Path) -> None:
    class Breaks(TrainerCallback):
        """Something that a second run of the batches does not find any more."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == AT:
                layer(model, "model.norm").register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("gone")))

    run, health = watched(tmp_path, qlora(), Spoil(), Breaks(), max_steps=AT, gradient_accumulation_steps=1)
    assert "raised KeyError: 'gone'" in health.problems[0].where
    assert run.state.global_step == AT


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_nan_is_found_where_it_arose_with_gradient_checkpointing(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    do, words = NOT_FINITE[kind]
    run, _ = watched(tmp_path, qlora(), Before(do), gradient_checkpointing=True)
    assert run.state.global_step == AT
    assert words in caplog.text


def test_a_loss_alone_that_is_not_finite_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def add_nan(module: nn.Module, args: Any, output: Any) -> Any:
        output["loss"] = output["loss"] + torch.tensor(float("nan"))
        return output

    model = qlora()
    model.base_model.model.register_forward_hook(add_nan)
    run, health = watched(tmp_path, model)
    assert run.state.global_step == 1
    assert health.problems[0].what == "the loss is NaN or infinite, and the gradients are finite"
    assert "the output head or the loss" in health.problems[0].where


def test_without_reading_each_step_the_step_is_still_the_first(tmp_path: Path) -> None:
    """Norms wait on the device until the logs; the first bad step is named, though others have followed it."""
    health = AdapterHealthCallback(on_problem="warn", check_base=False)
    watched(tmp_path, qlora(), Before(poisoned), health=health, logging_nan_inf_filter=False, logging_steps=6)
    assert health.problems[0].step == AT
    assert health.problems[0].where.startswith("not looked for: with logging_nan_inf_filter=False")
    assert "has taken the step" in health.problems[0].means
    assert health._calls == []  # no batches are held for it


@pytest.mark.parametrize("max_norm", [1.0, 0.0])
def test_that_clipping_spreads_it_is_said(tmp_path: Path, max_norm: float) -> None:
    """Trainer measures the norm by clipping where it does not clip."""

    def one(model: Any) -> None:
        parameter = next(p for p in model.parameters() if p.requires_grad)
        parameter.register_hook(lambda gradient: gradient * float("nan"))

    _, health = watched(tmp_path, qlora(), Before(one), max_grad_norm=max_norm, max_steps=AT)
    (problem,) = health.problems
    assert "in all 28 trained tensors" in problem.what
    assert problem.what.endswith("; one is enough, as Trainer's clipping spreads it to all")
    assert "in the gradient of base_model.model.model.layers.0.self_attn.q_proj.lora_A" in problem.where


def test_deepspeed_keeps_gradients_to_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its engine has taken the step and cleared them when Trainer comes to the event."""

    class Engine(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.deepspeed_plugin = object()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            model.zero_grad()

    run, health = watched(tmp_path, qlora(), Engine(), health=AdapterHealthCallback(idle_steps=3))
    assert health.problems == []
    assert run.state.global_step == run.state.max_steps
    assert "does not see gradients under DeepSpeed" in caplog.text


def test_warning_goes_on_and_an_error_is_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    health = AdapterHealthCallback(on_problem="warn", check_base=False)
    run, _ = watched(tmp_path, qlora(), Before(poisoned), health=health)
    assert run.state.global_step == run.state.max_steps
    assert len(health.problems) == run.state.max_steps - AT + 1
    assert all(record.levelno < logging.ERROR for record in caplog.records if record.name.startswith("hf_qlora"))
    model, before = qlora(), Before(poisoned)
    with pytest.raises(AdapterHealthError, match=r"step 3(.|\n)*layers\.1\.mlp"):
        watched(tmp_path, model, before, health=AdapterHealthCallback(on_problem="error"))
    assert_identical(adapters(model), before.kept)
    assert not model._forward_hooks


def test_a_scaler_may_try_too_large_a_scale() -> None:
    """float16's GradScaler begins with infinite gradients and leaves these steps out; only many in a row are wrong."""
    model, patience = qlora(), 4
    health = AdapterHealthCallback(on_problem="error", idle_steps=patience, check_base=False)
    args = SimpleNamespace(logging_nan_inf_filter=True, torch_compile=False, world_size=1)
    state, control = SimpleNamespace(global_step=0), SimpleNamespace(should_training_stop=False)
    health.on_train_begin(args, state, control, model=model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, float("inf"))
    optimizer = SimpleNamespace(scaler=object())
    for _ in range(patience - 1):
        health.on_pre_optimizer_step(args, state, control, model=model, optimizer=optimizer)
    with pytest.raises(AdapterHealthError):
        health.on_pre_optimizer_step(args, state, control, model=model, optimizer=optimizer)


# Gradients of zero, and none


def cut_off(model: Any) -> None:
    layer(model, "model.layers.0.self_attn.q_proj").register_forward_hook(lambda module, args, output: output.detach())


def multiplied_by_zero(model: Any) -> None:
    layer(model, "model.layers.0.self_attn.q_proj").register_forward_hook(lambda module, args, output: output * 0)


@pytest.mark.parametrize(
    ("do", "words"),
    [(cut_off, ("no gradient for 3", "2 of 28")), (multiplied_by_zero, ("a gradient of zero", "4 of 28"))],
)
def test_a_tensor_that_learns_nothing_is_found(
    tmp_path: Path, do: Callable[[Any], None], words: tuple[str, str]
) -> None:
    """Where q is 0, k's gradient is too."""
    model = qlora()
    do(model)
    run, health = watched(tmp_path, model, health=AdapterHealthCallback(idle_steps=3))
    assert run.state.global_step == 3
    (problem,) = health.problems
    assert all(word in problem.what for word in words)
    assert "layers.0.self_attn.q_proj.lora_A.default.weight" in problem.what
    assert "target_modules" in problem.do


def test_idle_steps_are_counted_in_a_row() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    watch = Gradients({"a": a, "b": b}, idle_steps=3)
    b.grad = torch.ones(2)
    found = []
    for step, gradient in enumerate([0.0, None, 1.0, 0.0, None, 0.0, None], 1):
        a.grad = None if gradient is None else torch.full((2,), gradient)
        watch.take(step)
        found += watch.read()
    assert found == [Found(6, idle=["a"])]


def test_tokens_that_no_batch_held_stop_nothing() -> None:
    name = "embed_tokens.token_adapter.trainable_tokens_delta.default"
    (found,) = findings.idle(Found(9, idle=[name], never=[]), 10, 5)
    assert not found.fatal
    assert "no batch held one of these tokens" in found.means


def test_experts_stop_nothing() -> None:
    names = ["layers.0.mlp.experts.3.up_proj.lora_A.default.weight", "layers.0.self_attn.q_proj.lora_A.default.weight"]
    others, experts = findings.idle(Found(9, idle=names, never=names), 10, 5)
    assert (others.fatal, experts.fatal) == (True, False)
    assert ("q_proj" in others.what, "experts" in experts.what) == (True, True)


# The frozen base


def one_code(model: Any) -> None:
    layer(model, "model.layers.1.mlp.down_proj").base_layer.weight.data[7, 0] ^= 1


def one_scale(model: Any) -> None:
    layer(model, "model.layers.1.mlp.down_proj").base_layer.weight.quant_state.absmax[0] ^= 1


def one_nested_scale(model: Any) -> None:
    layer(model, "model.layers.1.mlp.down_proj").base_layer.weight.quant_state.state2.absmax[0] *= 1.0001


def the_embedding(model: Any) -> None:
    layer(model, "model.embed_tokens").weight.data[5, 3] += 1e-6


def a_norm_cast(model: Any) -> None:
    norm = layer(model, "model.norm")
    norm.weight.data = norm.weight.data.to(torch.bfloat16).float() + 2**-9


CHANGES = {
    one_code: "model.layers.1.mlp.down_proj.base_layer.weight",
    one_scale: "model.layers.1.mlp.down_proj.base_layer (absmax)",
    one_nested_scale: "model.layers.1.mlp.down_proj.base_layer (state2.absmax)",
    the_embedding: "model.embed_tokens.weight",
    a_norm_cast: "model.norm.weight",
}


@pytest.mark.parametrize("do", CHANGES, ids=lambda do: do.__name__)
def test_a_base_that_changes_is_found(
    tmp_path: Path, do: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    """By the steps that follow, or at the end at the latest."""
    _, health = watched(tmp_path, qlora(), Before(do))
    (problem,) = health.problems
    assert problem.what == f"the frozen base has changed: base_model.model.{CHANGES[do]}"
    assert "AdapterHealthCallback stops training" in caplog.text


def stock() -> Any:
    """bitsandbytes' own layers, under PEFT's adapters."""
    model = base()
    for block in model.model.layers:  # type: ignore[union-attr]
        old = block.mlp.down_proj
        block.mlp.down_proj = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
        block.mlp.down_proj.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        block.mlp.down_proj.to("cpu")
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[arg-type]


def repack(layer: Any) -> None:
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )


def test_layers_that_bitsandbytes_repacks_are_no_changed_base(caplog: pytest.LogCaptureFixture) -> None:
    """Repacked in an eval forward, and unpacked with other scales by state_dict(); other changes are still found."""
    model = stock()
    health = AdapterHealthCallback(on_problem="error", idle_steps=1000)
    args = SimpleNamespace(logging_nan_inf_filter=True, torch_compile=False, world_size=1)
    state, control = SimpleNamespace(global_step=0), SimpleNamespace(should_training_stop=False)
    health.on_train_begin(args, state, control, model=model)
    down = layer(model, "model.layers.1.mlp.down_proj")
    for change in (repack, lambda down: down.state_dict()):
        before = frozen.as_bytes(down.weight).clone()
        change(down)
        assert not torch.equal(frozen.as_bytes(down.weight), before)
        for _ in range(20):
            health.on_pre_optimizer_step(args, state, control, model=model)
    (problem,) = [p for p in health.problems if "repacked" in p.what]
    assert "1 of 2 4-bit layers (base_model.model.model.layers.1.mlp.down_proj)" in problem.what
    assert "repacked" in caplog.text
    layer(model, "model.layers.0.mlp.down_proj").weight.data[7, 0] ^= 1
    with pytest.raises(AdapterHealthError, match=r"changed: base_model.model.model.layers.0.mlp.down_proj.weight\n"):
        health.on_train_end(args, state, control, model=model)


def test_a_base_that_changes_is_found_in_one_round_of_steps(tmp_path: Path) -> None:
    model = qlora()
    rounds = -(-len(FrozenBase(model).pieces) // frozen.PIECES)
    run, health = watched(tmp_path, model, Before(one_code, 1), max_steps=2 * rounds)
    assert run.state.global_step == health.problems[0].step <= rounds


def test_checksums_are_of_every_byte_that_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into pieces of any size, each byte is in one of them, once; a changed byte changes its piece alone."""
    monkeypatch.setattr(frozen, "BYTES", {"cpu": 1000})
    model = get_peft_model(base(), QLoRAConfig(r=2, target_modules=["q_proj"]))
    watch = FrozenBase(model)
    own = {id(p): p for p in model.parameters() if not p.requires_grad}
    packed = sum(p.numel() * p.element_size() for p in own.values())
    codes = [piece for piece in watch.pieces if "(" not in piece.name]
    assert sum(piece.stop - piece.start for piece in codes) == packed
    assert len({name for name, _ in frozen_tensors(model)}) == len(list(frozen_tensors(model)))
    for piece in watch.pieces[::97]:
        tensor: Any = piece.tensor()
        data = tensor.detach().reshape(-1).view(torch.uint8)
        data[piece.stop - 1] ^= 255
        watch.take_all()
        assert watch.read() == [piece.name]
        data[piece.stop - 1] ^= 255
        watch.take_all()
        watch.read()
    watch.take_all()
    assert watch.read() == []


# Scales and dtypes


def test_scales_that_are_not_finite_are_said_before_the_first_step(tmp_path: Path) -> None:
    model = get_peft_model(base(), AdaptiveDepthLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    name, scale = next(iter(depth.scales(model, "default").items()))
    scale.bias.data.fill_(float("inf"))
    run, health = watched(tmp_path, model)
    assert run.state.global_step <= 1
    assert f"1 of 2 adapted modules ({name} (default))" in health.problems[0].what
    assert health.problems[0].step == 0


def test_a_gain_at_its_bound_is_said_and_stops_nothing(tmp_path: Path) -> None:
    model = get_peft_model(base(), AdaptiveDepthLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    scale = next(iter(depth.scales(model, "default").values()))
    scale.bias.data.fill_(5 * scale.bound)
    run, health = watched(tmp_path, model, logging_steps=100)
    assert run.state.global_step == run.state.max_steps
    assert "at their bound in 1 of 2" in health.problems[0].what


def test_gains_at_their_bound_are_said_again_when_others_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two modules, of which one is at its bound from the start, both from step 3 on, and none from step 5 on."""
    model = get_peft_model(base(), AdaptiveDepthLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    first, second = depth.scales(model, "default").values()

    def move(*thetas: float) -> Callable[[Any], None]:
        def do(_: Any) -> None:
            for scale, theta in zip((first, second), thetas, strict=True):
                scale.bias.data.fill_(theta * scale.bound)

        return do

    move(5, 0)(model)
    moves = (Before(move(5, 5), step=3), Before(move(0, 0), step=5), Before(move(5, 0), step=6))
    _, health = watched(tmp_path, model, *moves, logging_steps=1)
    said = [(problem.step, problem.what.partition(" adapted")[0]) for problem in health.problems]
    text = "gains are at their bound in"
    assert said == [(0, f"{text} 1 of 2"), (3, f"{text} all 2"), (6, f"{text} 1 of 2")]
    assert caplog.text.count(text) == 3


def test_absmax_that_is_not_finite_is_said(tmp_path: Path) -> None:
    model = qlora()
    layer(model, "model.layers.0.mlp.up_proj").base_layer.weight.quant_state.state2.absmax[0] = float("inf")
    _, health = watched(tmp_path, model)
    assert (
        "(absmax) are not finite in 1 of 14 4-bit layers (base_model.model.model.layers.0.mlp.up_proj"
        in health.problems[0].what
    )


def test_adapters_that_are_no_master_copies_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = qlora(dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    run, health = watched(tmp_path, model)
    assert run.state.global_step == run.state.max_steps
    assert "all 28" in health.problems[0].what
    assert "peft_config=" in caplog.text


def test_a_cast_in_the_middle_of_training_is_found(tmp_path: Path) -> None:
    def cast(model: Any) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.double()

    run, health = watched(tmp_path, qlora(), Before(cast), optim="sgd")
    assert run.state.global_step == AT
    assert "torch.float64 now and was torch.float32" in health.problems[0].what


def test_a_base_that_was_cast_up_is_said() -> None:
    model = qlora(dtype=torch.bfloat16)
    assert findings.upcast(model) == []
    (problem,) = findings.upcast(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
    assert "float32" in problem.what
    assert not problem.fatal
    assert findings.upcast(qlora()) == []


def test_evaluations_before_and_after_training_are_left_alone(tmp_path: Path) -> None:
    health = AdapterHealthCallback()
    run = trainer(qlora(), tmp_path, health)
    run.evaluate()
    run.train()
    the_embedding(run.model)
    run.evaluate()
    assert health.problems == []


@pytest.mark.parametrize(
    "wrong",
    [{"on_problem": "cry"}, {"on_problem": ["stop"]}, {"idle_steps": 2}, {"idle_steps": 3.5}, {"check_base": "no"}],
)
def test_a_senseless_setting_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AdapterHealthCallback(**wrong)


def test_a_model_without_4_bit_layers_is_watched_too(tmp_path: Path) -> None:
    model = get_peft_model(llama(), QLoRAConfig(r=2, target_modules=["q_proj"], quantization=None))
    _, health = watched(tmp_path, model, Before(the_embedding))
    assert "embed_tokens" in health.problems[0].what
