"""Attention is observed as it is, without changing what is computed, once for each optimizer step.

Oracle: the definition, on the full matrix of attention weights that eager attention returns.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, VOCAB, llama, tokens
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from hf_qlora import AdaptiveDepthLoRAConfig
from hf_qlora.layers import attention, depth
from hf_qlora.layers.concentration import ROWS, choose_rows, concentration
from hf_qlora.validation import ConfigError


LAYERS = 3


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def base(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = llama(num_hidden_layers=LAYERS, **changes)
    for i, layer in enumerate(model.model.layers):  # from flat to peaked
        layer.self_attn.q_proj.weight.data *= 1 + 8 * i
    return model


def config(**settings: Any) -> AdaptiveDepthLoRAConfig:
    values = {"r": 2, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM", "attention": "concentration"}
    return AdaptiveDepthLoRAConfig(**{**values, **settings})


def adapted(model: nn.Module | None = None, **settings: Any) -> PeftModel:
    return get_peft_model(base() if model is None else model, config(**settings))


def averages(model: PeftModel) -> list[float | None]:
    """c̄ of each layer."""
    return [s.concentration for n, s in depth.scales(model, "default").items() if "q_proj" in n]


def scales(model: PeftModel) -> list[float]:
    return [s.attention for n, s in depth.scales(model, "default").items() if "q_proj" in n]


def step(model: PeftModel, ids: Tensor, **inputs: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()(input_ids=ids, labels=ids, **inputs).loss.backward()
    optimizer.step()


def by_definition(weights: Tensor, rows: Tensor, real: Tensor) -> float:
    """c of attention weights, (batch, heads, tokens, keys), over the given rows of each sequence."""
    values = []
    for b in range(weights.shape[0]):
        for h in range(weights.shape[1]):
            for row in rows[b].tolist():
                visible = (torch.arange(weights.shape[3]) <= row) & real[b].bool()
                n = int(visible.sum())
                if n < 2 or not visible[row]:
                    continue
                p = weights[b, h, row][visible].double()
                values.append(-(p * p.clamp(min=1e-300).log()).sum().item() / math.log(n))
    return 1 - sum(values) / len(values)


# --- what is observed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_concentration_is_its_definition(implementation: str, padding: str) -> None:
    ids = torch.randint(1, VOCAB, (2, 12))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 7:] = 0
    if padding == "left":
        mask[1, :5] = 0
    inputs = {} if padding == "none" else {"attention_mask": mask}
    reference = base()
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        weights = reference(input_ids=ids, output_attentions=True, **inputs).attentions
    model = base()
    model.set_attn_implementation(implementation)
    peft_model = adapted(model, quantization=None)
    step(peft_model, ids, **inputs)
    rows = choose_rows(0, mask.bool())
    expected = [by_definition(layer, rows, mask) for layer in weights]
    # fp32 softmax and logarithms of a dozen keys
    assert averages(peft_model) == pytest.approx(expected, abs=1e-5)
    assert max(expected) > 4 * min(expected)


def test_the_extremes_are_zero_and_one() -> None:
    module = nn.Identity()
    flat = concentration(module, torch.zeros(1, 2, 6, 4), torch.randn(1, 2, 6, 4))
    query = torch.eye(6)[None, None] * 1e4
    peaked = concentration(module, query, torch.eye(6)[None, None])
    assert flat is not None
    assert flat.item() == pytest.approx(0, abs=1e-6)
    assert peaked is not None
    assert peaked.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads_windows_and_caps_are_those_of_the_layer(causal: bool) -> None:
    module = nn.Identity()
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    found = concentration(module, query, key, scaling=0.3, softcap=2.0, sliding_window=4, is_causal=causal, seed=5)
    scores = 2.0 * torch.tanh(query @ key.repeat_interleave(2, 1).mT * 0.3 / 2.0)
    ahead = torch.arange(9)[:, None] - torch.arange(9)[None]
    visible = (ahead.abs() < 4) & ((ahead >= 0) | torch.tensor(not causal))
    p = scores.masked_fill(~visible, -math.inf).softmax(-1)
    ratios = []
    for b, rows in enumerate(choose_rows(5, torch.ones(2, 9, dtype=torch.bool)).tolist()):
        for row in rows:
            n = int(visible[row].sum())
            if n >= 2:
                q = p[b, :, row][..., visible[row]].double()
                ratios.append(-(q * q.log()).sum(-1) / math.log(n))
    assert found is not None
    assert found.item() == pytest.approx(1 - torch.stack(ratios).mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"cu_seq_lens_q": torch.tensor([0, 3, 6])},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
        {"mask": object()},
    ],
    ids=["packed", "packed by positions", "block mask"],
)
def test_what_cannot_be_told_apart_is_not_observed(arguments: dict[str, Any]) -> None:
    query = torch.randn(1, 2, 6, 4)
    assert concentration(nn.Identity(), query, query, **arguments) is None
    one = concentration(nn.Identity(), query[:, :, :1], query[:, :, :1])
    assert one is not None
    assert one.isnan()


# --- what is computed stays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_are_the_same_to_the_bit(implementation: str) -> None:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    watched, alone = adapted(), adapted(attention="off")
    for model in (watched, alone):
        model.get_base_model().set_attn_implementation(implementation)
        model.load_state_dict(watched.state_dict(), strict=False)
    for train in (False, True):
        before = torch.get_rng_state()
        found = watched.train(train)(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(found, alone.train(train)(input_ids=ids, attention_mask=mask).logits)
    for model in (watched, alone):
        model.eval()
    found = watched.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, alone.generate(input_ids=ids, max_new_tokens=5, do_sample=False))


def test_other_models_are_left_alone() -> None:
    adapted()
    model, ids = base(), tokens()
    model.train()(input_ids=ids)
    assert not any(attention._WATCHES in vars(module) for module in model.modules())


# --- when it is observed ---------------------------------------------------------------------------------------------


def test_it_is_observed_once_for_each_optimizer_step() -> None:
    model, ids = adapted(), tokens()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        before = (averages(model), scales(model))
        for _ in range(3):  # accumulation
            model.train()(input_ids=ids, labels=ids).loss.backward()
        assert (averages(model), scales(model)) == before
        optimizer.step()
        assert averages(model) != before[0]
    assert {s.observations for s in depth.scales(model, "default").values()} == {2}


def test_nothing_is_observed_in_eval_or_without_the_adapter() -> None:
    model, ids = adapted(), tokens()
    model.eval()(input_ids=ids)
    with model.disable_adapter():
        model.train()(input_ids=ids)
    model.add_adapter("second", config(attention="off"))
    model.set_adapter("second")
    step(model, ids)
    assert averages(model) == [None] * LAYERS
    assert scales(model) == [1.0] * LAYERS


def test_scales_are_ratios_to_the_mean_within_limits() -> None:
    model = adapted()
    step(model, tokens())
    found = [value for value in averages(model) if value is not None]
    mean = sum(found) / LAYERS
    assert scales(model) == pytest.approx([min(max(value / mean, 0.5), 2.0) for value in found])
    assert len(set(scales(model))) > 1


def test_averages_move() -> None:
    model = adapted()
    found: dict[str, float] = {}
    (watch,) = {id(w): w for m in model.modules() for w, _ in vars(m).get(attention._WATCHES, {}).values()}.values()
    original = watch._means
    watch._means = lambda: found.update(original()) or dict(found)
    step(model, tokens())
    before = averages(model)
    assert before == pytest.approx(list(found.values()))
    step(model, tokens())
    moved = [a + 0.1 * (c - a) for a, c in zip(before, found.values(), strict=True)]
    assert averages(model) == pytest.approx(moved)
    assert before != pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_changes_nothing(reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = adapted(lora_dropout=0.2, init_lora_weights=False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for i in range(3):
            torch.manual_seed(i)
            step(model, torch.randint(1, VOCAB, (2, 16)))
        results.append((averages(model), scales(model), {n: p.clone() for n, p in model.named_parameters()}))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(p, results[1][2][name]) for name, p in results[0][2].items())


# --- and then --------------------------------------------------------------------------------------------------------


def test_what_was_observed_is_folded_and_comes_back(tmp_path: Path) -> None:
    model, ids = adapted(init_lora_weights=False), tokens()
    step(model, ids)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert averages(again) == averages(model)
    assert scales(again) == scales(model)
    with torch.no_grad():
        expected, found = model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    step(again, ids)
    assert averages(again) != averages(model)


def test_resume_equals_uninterrupted(tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, VOCAB, (12, 16))]

    def run(**more: Any) -> PeftModel:
        torch.manual_seed(7)
        model = adapted(lora_dropout=0.1)
        arguments = tf.TrainingArguments(
            str(tmp_path), max_steps=6, save_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        tf.Trainer(model, arguments, train_dataset=rows).train(**more)
        return model

    straight, resumed = run(), run(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert averages(resumed) == averages(straight)
    assert scales(resumed) == scales(straight)
    expected = dict(straight.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in resumed.named_parameters())


def test_nothing_stays_on_a_merged_model() -> None:
    model = adapted()
    step(model, tokens())
    merged = model.merge_and_unload()
    assert not any(attention._WATCHES in vars(module) for module in merged.modules())


def test_a_copy_observes_for_itself() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    step(twin, tokens())
    assert averages(model) == [None] * LAYERS
    assert None not in averages(twin)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit", "qwen2"])
def test_families_are_observed(name: str) -> None:
    (family,) = [family for family in ARCHITECTURES if family.name == name]
    targets = {"bert": ["query"], "gpt2": ["c_attn"], "t5": ["q"], "vit": ["q_proj", "query"], "qwen2": ["q_proj"]}
    given = AdaptiveDepthLoRAConfig(
        r=2, target_modules=targets[name], task_type=family.task_type, attention="concentration", **family.options
    )
    model = get_peft_model(family.make(), given)
    inputs = family.inputs()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    output = model.train()(**inputs)
    output.logits.float().square().mean().backward()
    optimizer.step()
    found = [scale.concentration for scale in depth.scales(model, "default").values()]
    assert found
    assert all(value is not None and 0 < value < 1 for value in found)


def test_a_model_whose_attention_cannot_be_seen_is_refused_by_name() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(64, 64)

    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

    with pytest.raises(ConfigError, match=r"cannot observe layers\.0: Old .*attention='off'"):
        get_peft_model(Old(), AdaptiveDepthLoRAConfig(r=2, target_modules=["q_proj"], attention="concentration"))


# --- beside other work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [base, None], ids=["llama", "bert"])
def test_padding_is_not_looked_at(make: Any) -> None:
    """128 tokens of which 6 are real, as padding="max_length" gives: rows are drawn among those 6."""
    (family,) = [family for family in ARCHITECTURES if family.name == "bert"]
    given = {"r": 2, "attention": "concentration"}
    if make is None:
        settings = {"target_modules": ["query"], "task_type": "SEQ_CLS", **given}
        model = get_peft_model(family.make(), AdaptiveDepthLoRAConfig(**settings))
    else:
        model = adapted()
    mask = torch.zeros(2, 64, dtype=torch.long)
    mask[:, :6] = 1
    ids = torch.randint(1, VOCAB, (2, 64))
    labels = torch.tensor([0, 1]) if make is None else ids
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    optimizer.step()
    found = [scale.concentration for scale in depth.scales(model, "default").values()]
    assert all(value is not None for value in found)


def test_rows_are_drawn_among_those_that_are_real() -> None:
    real = torch.zeros(2, 64, dtype=torch.bool)
    real[0, :10], real[1, 50:60] = True, True
    for seed in range(20):
        rows = choose_rows(seed, real)
        assert real.gather(1, rows).all()
    few = choose_rows(0, real & (torch.arange(64) < 3))
    assert set(range(3)) <= set(few[0].tolist())


@pytest.mark.parametrize("kind", ["mask", "position_bias"])
def test_what_is_added_to_scores_counts(kind: str) -> None:
    """ALiBi's slopes, T5's positions: against the definition, every row being looked at."""
    query, key = torch.randn(1, 2, ROWS, 4), torch.randn(1, 2, ROWS, 4)
    added = torch.randn(1, 2, ROWS, ROWS)
    causal = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
    bias = added.masked_fill(~causal, torch.finfo(torch.float32).min)
    given = {"mask": bias} if kind == "mask" else {"position_bias": added, "is_causal": True}
    found = concentration(nn.Identity(), query, key, **given)
    weights = (query.double() @ key.double().mT / 2 + added.double()).masked_fill(~causal, -math.inf).softmax(-1)
    rows = torch.arange(ROWS)[None]
    assert found is not None
    assert found.item() == pytest.approx(by_definition(weights, rows, torch.ones(1, ROWS)), abs=1e-6)


def test_nothing_to_see_is_no_error() -> None:
    model, ids = adapted(), torch.randint(1, VOCAB, (2, 1))
    step(model, ids)
    assert averages(model) == [None] * LAYERS
    assert scales(model) == [1.0] * LAYERS


def test_another_optimizer_ends_no_step() -> None:
    model, ids = adapted(), tokens()
    other = nn.Linear(2, 2)
    stepping = torch.optim.SGD(other.parameters(), lr=1.0)
    loss = model.train()(input_ids=ids, labels=ids).loss
    other(torch.ones(1, 2)).sum().backward()
    stepping.step()
    loss.backward()
    assert {s.observations for s in depth.scales(model, "default").values()} == {0}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
def test_an_optimizer_that_steps_within_backward_changes_nothing_before_its_end(checkpointing: bool | None) -> None:
    ids, found = torch.randint(1, VOCAB, (2, 16)), []
    for within in (False, True):
        model = adapted(init_lora_weights=False)
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained if within else []:
            own = torch.optim.SGD([parameter], lr=0.0)
            parameter.register_post_accumulate_grad_hook(lambda _, own=own: own.step())
        together = torch.optim.SGD(trained, lr=0.0)
        gradients = []
        for _ in range(2):
            model.train()(input_ids=ids, labels=ids).loss.backward()
            gradients += [parameter.grad.clone() for parameter in trained]
            if not within:
                together.step()
            model.zero_grad()
        assert {s.observations for s in depth.scales(model, "default").values()} == {2}
        found.append((gradients, averages(model), scales(model)))
    assert all(torch.equal(one, other) for one, other in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1:] == found[1][1:]


def test_generating_before_a_step_is_not_what_is_observed() -> None:
    ids, prompt = torch.randint(1, VOCAB, (2, 16)), torch.randint(1, VOCAB, (1, 4))
    found = []
    for generates in (False, True):
        model = adapted(init_lora_weights=False)
        if generates:
            with torch.no_grad():
                model.train()(input_ids=prompt)
        step(model, ids)
        found.append(averages(model))
    assert found[0] == found[1]


def test_an_adapter_that_pefts_functions_deleted_disturbs_no_optimizer() -> None:
    """transformers' `delete_adapter` calls them, and no method of ours."""
    model = base()
    model.add_adapter(config())
    ids = tokens()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.delete_adapter("default")
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    model.train()(input_ids=ids)


def test_training_without_an_observation_is_told(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model, ids = adapted(), tokens()
    model.save_pretrained(tmp_path)
    assert "its scales stayed 1" not in caplog.text
    model.train()(input_ids=ids, labels=ids).loss.backward()
    for parameter in model.parameters():  # by something that is no torch optimizer
        if parameter.grad is not None:
            parameter.data -= 1e-2 * parameter.grad
    model.save_pretrained(tmp_path)
    assert "its scales stayed 1" in caplog.text


def _rank(rank: int, file: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = adapted(init_lora_weights=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    torch.manual_seed(rank)
    ids = torch.randint(1, VOCAB, (2, 16))
    for number in range(2):
        if rank == 0 or number:  # a process may be without a batch at first
            model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    torch.save((averages(model), ids), f"{results}.{rank}")
    torch.distributed.destroy_process_group()


def test_processes_agree(tmp_path: Path) -> None:
    """Each sees its own batch; averages are of both, and a process that saw nothing at first holds nobody up."""
    files = str(tmp_path / "meet"), str(tmp_path / "result")
    torch.multiprocessing.spawn(_rank, files, nprocs=2)
    (first, ids_0), (second, ids_1) = (torch.load(f"{files[1]}.{rank}") for rank in range(2))
    assert first == second
    alone = []
    for ids in (ids_0, ids_1):
        model = adapted(init_lora_weights=False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        for batch in (ids_0, ids):
            model.train()(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
        alone.append(averages(model))
    assert first == pytest.approx([(a + b) / 2 for a, b in zip(*alone, strict=True)], rel=1e-5)
    assert alone[0] != pytest.approx(alone[1], rel=1e-4)


def test_a_frozen_adapter_is_not_observed() -> None:
    model, ids = adapted(init_lora_weights=False), tokens()
    model.requires_grad_(False)
    head = model.get_base_model().lm_head.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([head], lr=1e-3)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert averages(model) == [None] * LAYERS


def test_copies_and_state_dicts_have_what_was_observed() -> None:
    model, ids = adapted(init_lora_weights=False, quantization=None), tokens()
    step(model, ids)
    model.train()(input_ids=ids)  # between a forward and its step
    twin = copy.deepcopy(model)
    other = adapted(init_lora_weights=False, quantization=None)
    other.load_state_dict(model.state_dict())
    for again in (twin, other):
        assert averages(again) == averages(model)
        with torch.no_grad():
            assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    step(twin, ids)
    assert {s.observations for s in depth.scales(twin, "default").values()} == {2}


def test_a_deleted_adapter_is_observed_no_more() -> None:
    model = adapted()
    model.add_adapter("second", config(attention="off"))
    model.set_adapter("second")
    model.delete_adapter("default")
    assert not any(attention._WATCHES in vars(module) for module in model.modules())


def test_a_hot_swapped_adapter_is_observed_no_more(tmp_path: Path) -> None:
    model, ids = adapted(init_lora_weights=False), tokens()
    step(model, ids)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_mask_for_all_rows_alike_is_understood() -> None:
    query, key = torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 4)
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[1, ..., 4:] = False
    found = concentration(nn.Identity(), query, key, mask)
    expected = concentration(nn.Identity(), query, key, mask.expand(2, 1, 6, 6))
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


def test_a_compiled_model_is_observed() -> None:
    model, ids = adapted(), tokens()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    compiled.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert None not in averages(model)


def test_an_unpickled_model_observes_in_another_process(tmp_path: Path) -> None:
    model = adapted(quantization=None)
    step(model, tokens())
    torch.save(model, tmp_path / "model.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
ids = torch.randint(1, {VOCAB}, (2, 16))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model.train()(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
from hf_qlora.layers import depth
print({{scale.observations for scale in depth.scales(model, "default").values()}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "{2}"


def test_each_stack_has_its_own_mean() -> None:
    (t5,) = [family for family in ARCHITECTURES if family.name == "t5"]
    model = get_peft_model(
        t5.make(),
        AdaptiveDepthLoRAConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM", attention="concentration"),
    )
    ids = torch.randint(1, VOCAB, (2, 16))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()(input_ids=ids, decoder_input_ids=ids).logits.sum().backward()
    optimizer.step()
    found: dict[str, dict[str, tuple[float, float]]] = {"encoder": {}, "decoder": {}}
    for name, scale in depth.scales(model, "default").items():
        assert scale.concentration is not None
        stack = "encoder" if "encoder" in name else "decoder"
        found[stack][name.partition(".block.")[2].partition(".")[0]] = scale.attention, scale.concentration
    for layers in found.values():
        mean = sum(c for _, c in layers.values()) / len(layers)
        for a, c in layers.values():
            assert a == pytest.approx(min(max(c / mean, 0.5), 2.0), rel=1e-5)


def test_gains_alone_are_observed_too() -> None:
    model = adapted(init_lora_weights=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_magnitude_vector" in name)
    step(model, tokens())
    assert None not in averages(model)


def test_a_reference_adapter_as_trl_makes_it_computes_the_same() -> None:
    """Of the same config, with the parameters copied."""
    model, ids = adapted(quantization=None, init_lora_weights=False), tokens()
    step(model, ids)
    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):
            if ".default" in name:
                model.get_parameter(name.replace(".default", ".ref")).copy_(parameter)
        expected = model.eval()(input_ids=ids).logits
        model.set_adapter("ref")
        assert torch.equal(model(input_ids=ids).logits, expected)
