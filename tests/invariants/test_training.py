"""Training is the same training: interrupted or not, evaluated, merged or saved in between, checkpointed.

Two runs that do the same arithmetic are compared bit for bit, with dropout, on the CPU. The laws hold also with
bitsandbytes' CPU packing forced on, which only AVX512-BF16 processors show by themselves.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from architectures import ARCHITECTURES
from peft import PeftModel, get_peft_model
from runs import (
    HALF,
    adapters,
    assert_identical,
    base,
    force_packing,
    interrupted,
    log,
    outcome,
    qlora,
    rows,
    trainer,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_qlora import QLoRAConfig, quantize_model
from hf_qlora.files import STATE_NAME
from hf_qlora.trainer.checkpoint import CheckpointError


SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "folded": {"use_rslora": True, "alpha_pattern": {"q_proj": 5, "down_proj": 20}},
}
CHECKPOINT_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
}

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage_collection() -> Iterator[None]:
    """Trainer collects garbage at every start: half of these tests' time, if the libraries' objects were looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=[False, True], ids=["packing-off", "packing-forced"])
def packing(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=list(SCALINGS))
def scaling(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SCALINGS[request.param]


class AtStep(TrainerCallback):
    """Call `look(model)` before the optimizer's step of the given number."""

    def __init__(self, step: int, look: Callable[[nn.Module], None]) -> None:
        self.step, self.look = step, look

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.look(model)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }


def packed_bytes(model: nn.Module) -> dict[str, Tensor]:
    """The base as it is stored: codes, scales, tables, offset."""
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit))
    return {
        f"{name}.{part}": tensor.clone()
        for name, layer in layers
        for part, tensor in [("codes", layer.weight.data), *layer.weight.quant_state.as_dict(packed=True).items()]
    }


# Resuming


def test_resume_equals_uninterrupted(tmp_path: Path, packing: bool, scaling: dict[str, Any]) -> None:
    straight = trainer(qlora(packing, **scaling), tmp_path / "straight")
    straight.train()
    checkpoint = interrupted(qlora(packing, **scaling), tmp_path / "cut")
    resumed = trainer(qlora(packing, **scaling), tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_identical(outcome(resumed), outcome(straight))
    assert len(log(resumed)) == 2 * HALF
    assert all(tensor.any() for tensor in adapters(resumed.model).values())


def test_resume_of_a_loaded_adapter_equals_uninterrupted(tmp_path: Path, scaling: dict[str, Any]) -> None:
    """The model is not made anew from its config but loaded from the checkpoint, as after a crash."""
    straight = trainer(qlora(**scaling), tmp_path / "straight")
    straight.train()
    checkpoint = interrupted(qlora(**scaling), tmp_path / "cut")
    loaded = PeftModel.from_pretrained(base(), checkpoint, is_trainable=True)
    resumed = trainer(loaded, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_identical(outcome(resumed), outcome(straight))


def test_resume_with_dora_biases_and_saved_modules_equals_uninterrupted(tmp_path: Path) -> None:
    options = {**SCALINGS["folded"], "use_dora": True, "modules_to_save": ["lm_head"], "rank_pattern": {"k_proj": 2}}
    straight = trainer(qlora(**options), tmp_path / "straight")
    straight.train()
    checkpoint = interrupted(qlora(**options), tmp_path / "cut")
    resumed = trainer(qlora(**options), tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_identical(outcome(resumed), outcome(straight))


def test_checkpoint_folder_has_these_files(tmp_path: Path, scaling: dict[str, Any]) -> None:
    """The state file is there exactly where something was folded, and a model saved at the end has none."""
    model = qlora(**scaling)
    checkpoint = interrupted(model, tmp_path)
    expected = CHECKPOINT_FILES | ({STATE_NAME} if scaling else set())
    assert {path.name for path in checkpoint.iterdir()} == expected
    model.save_pretrained(tmp_path / "final")
    assert {path.name for path in (tmp_path / "final").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    if scaling:  # it holds lora_B as it is in the model, and nothing else
        inside = {name: tensor for name, tensor in adapters(model).items() if "lora_B" in name}
        state = load_file(checkpoint / STATE_NAME)
        assert_identical({name.replace(".default", ""): tensor for name, tensor in inside.items()}, state)


def test_resume_without_the_state_file_is_close(tmp_path: Path) -> None:
    """(x · c) / c differs from x by a rounding or two, so the resumed run differs, but hardly."""
    options = SCALINGS["folded"]
    checkpoint = interrupted(qlora(**options), tmp_path)
    exact, close = qlora(**options), qlora(**options)
    exact.load_adapter(checkpoint, "default", is_trainable=True)
    (checkpoint / STATE_NAME).unlink()
    close.load_adapter(checkpoint, "default", is_trainable=True)
    before, after = adapters(exact), adapters(close)
    for name in before:  # two roundings of 2^-24 each
        torch.testing.assert_close(after[name], before[name], rtol=2**-22, atol=0)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    resumed = trainer(qlora(**options), tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(log(resumed)) == 2 * HALF


def test_a_state_file_of_another_save_is_not_used(tmp_path: Path) -> None:
    """A copied folder with a state file left over from an older save loads what its safetensors file says."""
    model = qlora(**SCALINGS["folded"])
    checkpoint = interrupted(model, tmp_path)
    old = (checkpoint / STATE_NAME).read_bytes()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1)
    model.save_pretrained(checkpoint)
    (checkpoint / STATE_NAME).write_bytes(old)
    loaded = PeftModel.from_pretrained(base(), checkpoint, is_trainable=True)
    for name, tensor in adapters(model).items():
        torch.testing.assert_close(adapters(loaded)[name], tensor, rtol=2**-22, atol=0)


@pytest.mark.parametrize(
    "change", [{"use_rslora": False}, {"alpha_pattern": {}}, {"alpha_pattern": {"q_proj": 50}}], ids=str
)
def test_another_fold_keeps_the_function_and_is_no_resumption(tmp_path: Path, change: dict[str, Any]) -> None:
    """Changed scalings move into lora_B: the model computes what the checkpoint's did; its optimizer is of another."""
    trained = qlora(**SCALINGS["folded"])
    checkpoint = interrupted(trained, tmp_path)
    other = qlora(**{**SCALINGS["folded"], **change})
    tokens = torch.stack([row["input_ids"] for row in rows(2)])
    fresh = other.eval()(tokens).logits
    other.load_adapter(checkpoint, "default", is_trainable=True)
    expected, found = trained.eval()(tokens).logits, other.eval()(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # fp32, logits of order 1
    assert (fresh - expected).abs().max() > 0.01
    with pytest.raises(CheckpointError, match=f"trained with {next(iter(change))}"):
        trainer(other, tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_resume_without_rslora_and_patterns_of_a_folded_checkpoint_and_back(tmp_path: Path) -> None:
    """Folded → plain → folded again: each keeps the function of the one before."""
    tokens = torch.stack([row["input_ids"] for row in rows(2)])
    first = qlora(**SCALINGS["folded"])
    interrupted(first, tmp_path / "first")
    second = qlora()
    second.load_adapter(tmp_path / "first" / f"checkpoint-{HALF}", "default", is_trainable=True)
    second.save_pretrained(tmp_path / "second")
    third = qlora(**SCALINGS["folded"])
    third.load_adapter(tmp_path / "second", "default", is_trainable=True)
    expected = first.eval()(tokens).logits
    for model in (second, third):
        torch.testing.assert_close(model.eval()(tokens).logits, expected, rtol=0, atol=1e-5)


# Evaluation in between


def test_evaluation_changes_nothing(tmp_path: Path, packing: bool, scaling: dict[str, Any]) -> None:
    without = trainer(qlora(packing, **scaling), tmp_path)
    without.train()
    evaluated = trainer(qlora(packing, **scaling), tmp_path, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    evaluated.train()
    assert sum("eval_loss" in entry for entry in evaluated.state.log_history) == 2 * HALF + 1
    assert_identical(outcome(evaluated), outcome(without))


@pytest.mark.parametrize(("targets", "count"), [("all-linear", 28), (["q_proj"], 4)], ids=["all", "q_proj"])
def test_every_adapter_tensor_gets_a_gradient_after_an_evaluation(
    tmp_path: Path, packing: bool, targets: Any, count: int
) -> None:
    """Where only q_proj is adapted, gradients come through layers without an adapter, which must let them through."""
    seen: dict[str, Tensor | None] = {}
    look = AtStep(2 * HALF, lambda model: seen.update(gradients(model)))
    trainer(qlora(packing, target_modules=targets), tmp_path, look, eval_strategy="steps", eval_steps=2).train()
    assert len(seen) == count
    assert [name for name, gradient in seen.items() if gradient is None or not gradient.any()] == []


def test_the_best_model_comes_back(tmp_path: Path, packing: bool, scaling: dict[str, Any]) -> None:
    """`load_best_model_at_end` gives the adapters of the best step to the bit, not those of the last."""
    scores = iter([0.5, 0.9, 0.1])
    at_step: dict[int, dict[str, Tensor]] = {}

    class Keep(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            at_step[state.global_step] = adapters(model)

    run = trainer(
        qlora(packing, **scaling),
        tmp_path,
        Keep(),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        compute_metrics=lambda _: {"score": next(scores)},
    )
    run.train()
    assert Path(run.state.best_model_checkpoint or "").name == "checkpoint-4"
    frozen = {name: p.detach() for name, p in run.model.named_parameters() if name in at_step[4]}
    assert_identical(frozen, at_step[4])
    assert any(not torch.equal(at_step[4][name], at_step[6][name]) for name in at_step[4])


# Gradient checkpointing and accumulation


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_gradient_checkpointing_gives_the_same_gradients(
    name: str, use_reentrant: bool, when: str, packing: bool
) -> None:
    """With dropout, enabled before or after the adapter is put on, after an eval forward, for text and for images.

    transformers makes the first layer's input require a gradient, as reentrant checkpointing needs, for text only.
    """
    architecture = next(architecture for architecture in ARCHITECTURES if architecture.name == name)
    inputs = architecture.inputs()
    options = {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear", **architecture.options}

    def step(checkpointing: bool) -> tuple[float, dict[str, Tensor | None]]:
        torch.manual_seed(1)
        model = architecture.make()
        how = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        if checkpointing and when == "before":
            model.gradient_checkpointing_enable(**how)
        model = get_peft_model(model, QLoRAConfig(**options))
        force_packing(model, packing)
        if checkpointing and when == "after":
            model.gradient_checkpointing_enable(**how)
        randomize(model)
        with torch.no_grad():
            model.eval()(**inputs)
        torch.manual_seed(3)
        loss = model.train()(**inputs).logits.square().mean()
        loss.backward()
        return loss.item(), gradients(model)

    expected, found = step(False), step(True)
    assert_identical(found, expected)
    assert all(gradient is not None and gradient.any() for gradient in found[1].values())


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_trainer_with_gradient_checkpointing_is_the_same_training(tmp_path: Path, use_reentrant: bool) -> None:
    plain = trainer(qlora(), tmp_path)
    plain.train()
    checkpointed = trainer(
        qlora(),
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        eval_strategy="steps",
        eval_steps=2,
    )
    checkpointed.train()
    assert_identical(outcome(checkpointed), outcome(plain))


CHECKPOINTING: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "budget": {"mode": "budget", "budget_bytes": 500_000},
    "offload": {"mode": "offload"},
}


@pytest.mark.parametrize("settings", CHECKPOINTING.values(), ids=CHECKPOINTING)
def test_trainer_with_a_mode_of_checkpointing_is_the_same_training(tmp_path: Path, settings: dict[str, Any]) -> None:
    """By Trainer's arguments and by the config, with accumulation, evaluation and sequences of any length."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    data = [{name: ids[: 5 + i % 7] for name, ids in row.items()} for i, row in enumerate(rows(12))]

    def run(model: nn.Module, **given: Any) -> dict[str, Any]:
        training = trainer(model, tmp_path, **options, **given)
        training.train_dataset, training.data_collator = data, padded
        training.train()
        return outcome(training)

    plain = run(qlora())
    arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": settings}
    assert_identical(run(qlora(), **arguments), plain)
    assert_identical(run(qlora(checkpointing=settings)), plain)


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    columns = {"input_ids": 0, "labels": -100}
    return {
        name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in columns.items()
    }


@pytest.mark.parametrize("mode", [None, "full"])
def test_chunked_mlps_are_the_same_training(tmp_path: Path, mode: str | None) -> None:
    """Without dropout, of which chunks draw other masks, and with SGD, as below."""
    options = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 4}
    chunked = {"mode": mode, "chunk_size": 5}
    models = [qlora(lora_dropout=0.0, checkpointing=settings) for settings in (None, chunked)]
    for model in models:
        randomize(model)
    started = adapters(models[0])
    for model in models:
        trainer(model, tmp_path, **options).train()
    assert_trained_alike(models[1], models[0], started)


def test_accumulation_equals_the_larger_batch(tmp_path: Path, packing: bool) -> None:
    """2 × 2 rows against 4 at once, without dropout, with SGD: Adam would blow up the rounding of small gradients."""
    options = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
    models = [qlora(packing, lora_dropout=0.0) for _ in range(2)]
    for model in models:
        randomize(model)
    started = adapters(models[0])
    trainer(models[0], tmp_path, per_device_train_batch_size=4, **options).train()
    trainer(models[1], tmp_path, gradient_accumulation_steps=2, **options).train()
    assert_trained_alike(models[1], models[0], started)


@pytest.mark.parametrize("chunked_loss", [True, False], ids=["chunked", "full-logits"])
def test_every_token_counts_the_same_whichever_batch_it_is_in(tmp_path: Path, chunked_loss: bool) -> None:
    """8 rows of 3 to 12 tokens at once, and one by one: a mean of their means would weigh short rows' tokens more."""
    lengths = (3, 12, 5, 4, 12, 7, 3, 9)
    data = [{name: ids[:n] for name, ids in row.items()} for row, n in zip(rows(), lengths, strict=True)]
    models = [qlora(lora_dropout=0.0, chunked_loss=chunked_loss) for _ in range(2)]
    for model in models:
        randomize(model)
    started = adapters(models[0])
    for model, size in zip(models, (8, 1), strict=True):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 4}
        training = trainer(model, tmp_path, optim="sgd", learning_rate=0.5, **options)
        training.train_dataset, training.data_collator = data, padded
        training.train()
    assert_trained_alike(models[1], models[0], started)


def assert_trained_alike(model: nn.Module, other: nn.Module, started: dict[str, Tensor]) -> None:
    """Equal but for sums in another order, over four steps of SGD."""
    found, expected = adapters(model), adapters(other)
    for name in expected:
        moved = (expected[name] - started[name]).abs().max().item()
        assert moved > 0
        # the sum over the batch in another order, and four steps' rounding of the parameter; a lost half would be 0.5
        rounding = 4 * 2**-24 * expected[name].abs().max().item()
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4 * moved + rounding)


# dtypes


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "bf16-autocast"])
def test_a_bf16_base_keeps_its_dtypes(tmp_path: Path, autocast: bool) -> None:
    """Embeddings, head and norms are not cast up; adapters and their optimizer states are fp32."""
    model = qlora(dtype=torch.bfloat16, **SCALINGS["folded"])
    dense = {name: p.clone() for name, p in model.named_parameters() if p.is_floating_point() and not p.requires_grad}
    kinds = ("embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "model.norm")
    assert all(any(kind in name for name in dense) for kind in kinds)
    checkpoint = interrupted(model, tmp_path, bf16=autocast)
    resumed = trainer(qlora(dtype=torch.bfloat16, **SCALINGS["folded"]), tmp_path, bf16=autocast)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for run in (model, resumed.model):
        parameters = dict(run.named_parameters())
        assert_identical({name: parameters[name].data for name in dense}, {name: p.data for name, p in dense.items()})
        assert {p.dtype for p in dense.values()} == {torch.bfloat16}
        assert {p.dtype for p in run.parameters() if p.requires_grad} == {torch.float32}
    assert resumed.optimizer is not None
    states = resumed.optimizer.state_dict()["state"].values()
    assert {t.dtype for state in states for t in state.values()} == {torch.float32}
    assert {tensor.dtype for tensor in load_file(checkpoint / "adapter_model.safetensors").values()} == {torch.float32}


def test_a_bf16_run_resumes_to_the_bit(tmp_path: Path, packing: bool) -> None:
    options = {"dtype": torch.bfloat16, **SCALINGS["folded"]}
    straight = trainer(qlora(packing, **options), tmp_path / "straight")
    straight.train()
    checkpoint = interrupted(qlora(packing, **options), tmp_path / "cut")
    resumed = trainer(qlora(packing, **options), tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_identical(outcome(resumed), outcome(straight))


# A plain loop


def randomize(model: nn.Module) -> None:
    """Give every adapter tensor values that matter; lora_B starts at zero."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def nothing(model: PeftModel, tokens: Tensor, folder: Path) -> None:
    pass


def evaluate(model: PeftModel, tokens: Tensor, folder: Path) -> None:
    model(tokens)


def generate(model: PeftModel, tokens: Tensor, folder: Path) -> None:
    model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)


def merge_and_unmerge(model: PeftModel, tokens: Tensor, folder: Path) -> None:
    model(tokens)
    model.merge_adapter()
    model(tokens)
    model.unmerge_adapter()


def merge_twice(model: PeftModel, tokens: Tensor, folder: Path) -> None:
    for _ in range(2):
        merge_and_unmerge(model, tokens, folder)


def merge_and_disable(model: PeftModel, tokens: Tensor, folder: Path) -> None:
    """PEFT unmerges by itself where a merged model is run with its adapters disabled."""
    model.merge_adapter()
    with model.disable_adapter():
        model(tokens)
    model(tokens)


def save(model: PeftModel, tokens: Tensor, folder: Path) -> None:
    model(tokens)
    model.save_pretrained(folder)


def save_base(model: PeftModel, tokens: Tensor, folder: Path) -> None:
    model(tokens)
    model.get_base_model().state_dict()


def disable(model: PeftModel, tokens: Tensor, folder: Path) -> None:
    with model.disable_adapter():
        model(tokens)


def move(model: PeftModel, tokens: Tensor, folder: Path) -> None:
    model(tokens)
    model.to("cpu")


INTERLUDES = (
    nothing,
    evaluate,
    generate,
    merge_and_unmerge,
    merge_twice,
    merge_and_disable,
    save,
    save_base,
    disable,
    move,
)


def loop(interlude: Callable[..., None], packing: bool, folder: Path) -> dict[str, Any]:
    """Three AdamW steps with dropout; after each the model is in eval mode for an interlude."""
    model = qlora(packing, **SCALINGS["folded"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.stack([row["input_ids"] for row in rows(2)])
    losses = []
    before = packed_bytes(model)
    for step in range(3):
        model.train()
        torch.manual_seed(step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        last = gradients(model)
        optimizer.zero_grad()
        losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            interlude(model, tokens, folder)
    assert_identical(packed_bytes(model), before)
    assert all(gradient is not None and gradient.any() for gradient in last.values())
    return {"adapters": adapters(model), "optimizer": optimizer.state_dict(), "losses": losses, "gradients": last}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return loop(nothing, False, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("interlude", INTERLUDES, ids=lambda interlude: interlude.__name__)
def test_an_interlude_in_eval_mode_changes_no_bit(
    interlude: Callable[..., None], packing: bool, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    assert_identical(loop(interlude, packing, tmp_path), undisturbed)


def test_a_saved_and_reloaded_base_trains_the_same(tmp_path: Path, packing: bool) -> None:
    """The quantized base, saved after an eval forward and loaded as 4-bit, trains as one quantized in place."""
    tokens = torch.stack([row["input_ids"] for row in rows(2)])
    live = qlora(packing)
    with torch.no_grad():
        live.eval()(tokens)
    live.unload().save_pretrained(tmp_path / "base")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    outcomes = []
    for quantized in (stored, quantize_model(base())):
        config = QLoRAConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(5)
        run = trainer(force_packing(get_peft_model(quantized, config), packing), tmp_path)
        run.train()
        outcomes.append(outcome(run))
    assert_identical(*outcomes)


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_unloading_leaves_nothing_of_training_behind(how: str) -> None:
    """A base without anything to train computes without a graph, and is pickled as before."""
    tokens = torch.stack([row["input_ids"] for row in rows(2)])
    model = qlora()
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    left = getattr(model, how)().eval()
    assert not left(tokens).logits.requires_grad
    again = pickle.loads(pickle.dumps(left))
    assert torch.equal(again(tokens).logits, left(tokens).logits)
