"""Within `fast_generation` only generating changes; the weights, and all that is done with them, stay as they were.

The kernel is a stand-in (`repacked_kernel.py`), so that this is tested on every processor; one test takes the real.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import gpt2, llama, tokens
from bitsandbytes.functional import has_avx512bf16
from peft import PeftModel, get_peft_model
from repacked_kernel import StandIn
from torch import Tensor, nn

from hf_qlora import NF4Config, QLoRAConfig, fast_generation, quantize_model
from hf_qlora.quant import generation, repacked
from hf_qlora.quant.linear4bit import Linear4bit


LAYERS = 14  # of a Llama with two layers


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()
    monkeypatch.setattr(repacked, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(repacked, "gemv", stand_in)
    repacked._kernel_error.cache_clear()
    torch.set_num_threads(1)
    assert repacked.obstacle_here(64) == ""
    stand_in.calls = 0
    yield stand_in
    repacked._kernel_error.cache_clear()


def base() -> nn.Module:
    return quantize_model(llama().to(torch.bfloat16), NF4Config()).eval()


def adapted(**settings: Any) -> PeftModel:
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    return get_peft_model(llama().to(torch.bfloat16), QLoRAConfig(**values)).eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in model.state_dict().items()}


def layers(model: nn.Module) -> list[Linear4bit]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def near(found: Tensor, expected: Tensor) -> bool:
    """bfloat16 scales change a product by 0.3 %, and two layers of them logits by a few roundings of 2^-9."""
    return 0 < float((found.double() - expected.double()).norm() / expected.double().norm()) < 0.03


# --- what it serves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [base, adapted])
def test_within_it_the_kernel_computes_nearly_the_same(make: Callable[[], nn.Module], kernel: StandIn) -> None:
    model, ids = make(), tokens()
    expected, before = logits(model, ids), state_bytes(model)
    assert kernel.calls == 0
    with fast_generation(model):
        assert near(logits(model, ids), expected)
        assert kernel.calls == LAYERS
        assert state_bytes(model) == before
    assert torch.equal(logits(model, ids), expected)
    assert kernel.calls == LAYERS
    assert state_bytes(model) == before
    assert all("repacked" not in layer.__dict__ for layer in layers(model))


def test_a_bias_is_added() -> None:
    model = quantize_model(gpt2().to(torch.bfloat16), NF4Config())  # Conv1D with biases
    for layer in layers(model):
        layer.bias.data = torch.randn_like(layer.bias)
    ids = tokens(4)
    expected = logits(model, ids)
    with fast_generation(model):
        assert near(logits(model, ids), expected)


def test_generate_serves_every_token(kernel: StandIn) -> None:
    model = adapted(task_type="CAUSAL_LM")
    ids = tokens(5)
    with fast_generation(model):
        made = model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert made.shape == (2, 8)
    assert kernel.calls == 3 * LAYERS


def test_bitsandbytes_kernel_gives_what_the_stand_in_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = adapted(), tokens()
    with fast_generation(model):
        expected = logits(model, ids)
    monkeypatch.undo()
    repacked._kernel_error.cache_clear()
    if not has_avx512bf16():
        with pytest.raises(RuntimeError, match="AVX512-BF16"), fast_generation(model):
            pytest.fail("there is no such kernel here")
        return
    with fast_generation(model):
        found = logits(model, ids)
    # The order of sums, and levels in bfloat16 (2^-9), through two layers
    assert float((found - expected).double().norm() / expected.double().norm()) < 0.02


# --- what it does not ------------------------------------------------------------------------------------------------


def _many_rows(model: nn.Module) -> Tensor:
    return logits(model, tokens(17))  # 34 of at most 32


def _no_rows(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return layers(model)[0](torch.empty(0, 128, dtype=torch.bfloat16))


def _gradients_wanted(model: nn.Module) -> Tensor:
    return model(input_ids=tokens(4)).logits.detach()


def _training_mode(model: nn.Module) -> Tensor:
    try:
        return logits(model.train(), tokens(4))
    finally:
        model.eval()


def _float16_autocast(model: nn.Module) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        return layers(model)[0](torch.randn(1, 128, dtype=torch.bfloat16))


@pytest.mark.parametrize("call", [_many_rows, _no_rows, _gradients_wanted, _training_mode, _float16_autocast])
def test_all_else_is_the_same_to_the_bit(call: Callable[[nn.Module], Tensor], kernel: StandIn) -> None:
    model = base()
    torch.manual_seed(1)
    expected = call(model)
    with fast_generation(model):
        torch.manual_seed(1)
        assert torch.equal(call(model), expected)
    assert kernel.calls == 0


def train_step(model: PeftModel, ids: Tensor) -> dict[str, Tensor]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    model.eval()
    return gradients


def test_training_within_it_is_training_and_is_seen_at_once() -> None:
    one, ids = adapted(), tokens()
    other = copy.deepcopy(one)
    expected = train_step(one, ids)
    with fast_generation(other):
        before = logits(other, ids)
        found = train_step(other, ids)
        after = logits(other, ids)
        assert not torch.equal(after, before)
        assert near(after, logits(one, ids))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert state_bytes(one) == state_bytes(other)


def test_merging_within_it_is_merging(kernel: StandIn) -> None:
    one, ids = adapted(), tokens()
    other = copy.deepcopy(one)
    one.merge_adapter()
    expected = logits(one, ids)
    with fast_generation(other):
        fast = logits(other, ids)
        other.merge_adapter()
        calls = kernel.calls
        assert torch.equal(logits(other, ids), expected)
        assert kernel.calls == calls  # merged layers are dense
        other.unmerge_adapter()
        assert torch.equal(logits(other, ids), fast)
    one.unmerge_adapter()
    assert torch.equal(logits(one, ids), logits(other, ids))
    assert state_bytes(one) == state_bytes(other)


def test_unloading_within_it_leaves_nothing_behind() -> None:
    one, ids = adapted(target_modules=["q_proj"]), tokens()  # the others become dense where they are
    other = copy.deepcopy(one)
    expected = one.merge_and_unload()
    with fast_generation(other):
        logits(other, ids)
        found = other.merge_and_unload()
        assert all("repacked" not in module.__dict__ for module in found.modules())
    assert torch.equal(logits(found, ids), logits(expected, ids))


def test_saving_within_it_is_saving(tmp_path: Path) -> None:
    model, ids = adapted(), tokens()
    model.save_pretrained(tmp_path / "before")
    with fast_generation(model):
        logits(model, ids)
        model.save_pretrained(tmp_path / "within")
    names = ("adapter_model.safetensors", "adapter_config.json")
    for name in names:
        assert (tmp_path / "within" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_adapters_come_and_go_within_it() -> None:
    model, ids = adapted(), tokens()
    first = logits(model, ids)
    config = QLoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    with fast_generation(model):
        model.add_adapter("second", config)
        model.set_adapter("second")
        second = logits(model, ids)
        with model.disable_adapter():
            assert not near(logits(model, ids), second)
        model.delete_adapter("second")
        model.set_adapter("default")
        assert near(logits(model, ids), first)
    assert torch.equal(logits(model, ids), first)


def test_a_copy_has_no_second_form() -> None:
    model, ids = base(), tokens()
    expected, plain = logits(model, ids), len(pickle.dumps(model))
    with fast_generation(model):
        logits(model, ids)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert len(pickle.dumps(model)) == plain
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        copies.append(torch.load(saved, weights_only=False))
    for copied in copies:
        assert all("repacked" not in layer.__dict__ for layer in layers(copied))
        assert torch.equal(logits(copied, ids), expected)


def test_it_follows_the_model_to_another_dtype_and_back(kernel: StandIn) -> None:
    layer = layers(base())[0]
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        with fast_generation(layer):
            fast = layer(x)
            calls = kernel.calls
            layer.to(torch.float32)
            layer(x)
            assert kernel.calls == calls
            layer.to(torch.bfloat16)
            assert torch.equal(layer(x), fast)
        assert torch.equal(layer(x), expected)


def test_a_base_loaded_within_it_is_the_one_that_generates() -> None:
    model, ids = base(), tokens()
    torch.manual_seed(5)
    other = base()
    expected = logits(other, ids)
    with fast_generation(model):
        logits(model, ids)
        for layer, new in zip(layers(model), layers(other), strict=True):
            layer.weight = copy.deepcopy(new.weight)
            layer.quant_state = layer.weight.quant_state
        rest = {name: t for name, t in other.state_dict().items() if "_proj" not in name}
        model.load_state_dict(rest, strict=False)
        assert near(logits(model, ids), expected)


# --- how it begins and ends ------------------------------------------------------------------------------------------


def test_it_nests_and_ends_with_the_last(kernel: StandIn) -> None:
    model, ids = adapted(), tokens()
    exact = logits(model, ids)
    with fast_generation(model):
        with fast_generation(model.get_base_model()):
            fast = logits(model, ids)
        assert torch.equal(logits(model, ids), fast)
    assert torch.equal(logits(model, ids), exact)


def test_an_error_ends_it() -> None:
    model = base()
    with pytest.raises(KeyError), fast_generation(model):
        raise KeyError
    assert all("repacked" not in layer.__dict__ for layer in layers(model))


def test_threads_share_it_and_the_last_one_ends_it() -> None:
    model, ids = base(), tokens()
    exact = logits(model, ids)
    with fast_generation(model):
        fast = logits(model, ids)
    found: list[bool] = []

    def work() -> None:
        for _ in range(10):
            with fast_generation(model):
                found.append(torch.equal(logits(model, ids), fast))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 40
    assert all("repacked" not in layer.__dict__ for layer in layers(model))
    assert torch.equal(logits(model, ids), exact)


def test_a_layer_may_be_let_go_of_while_it_is_called(kernel: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by another thread whose context ends between the question and the product."""
    model, ids = adapted(), tokens()
    original = Linear4bit._is_generating

    def ask_and_let_go(self: Linear4bit, *args: Any) -> bool:
        answer = original(self, *args)
        self.__dict__.pop("repacked", None)
        return answer

    with fast_generation(model):
        expected = logits(model, ids)
        monkeypatch.setattr(Linear4bit, "_is_generating", ask_and_let_go)
        assert torch.equal(logits(model, ids), expected)
        assert not any("repacked" in layer.__dict__ for layer in layers(model))


def test_no_other_weight_gets_the_address_of_one_that_was_repacked(kernel: StandIn) -> None:
    layer = layers(adapted())[0]
    packed, size = layer.weight.data.clone(), layer.weight.numel()
    address, form = packed.data_ptr(), repacked.Repacked()
    form.multiply(torch.ones(1, layer.in_features, dtype=torch.bfloat16), packed, layer.state)
    del packed
    others = [torch.zeros(size, dtype=torch.uint8) for _ in range(1000)]  # one of which would be there
    assert address not in {other.data_ptr() for other in others}


def test_layers_with_other_shapes_are_unpacked_as_ever(kernel: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    odd = nn.Sequential(nn.Linear(128, 48), nn.Linear(48, 64)).to(torch.bfloat16)  # 48 is no multiple of 32
    model = quantize_model(nn.Sequential(nn.Linear(64, 128, dtype=torch.bfloat16), odd), NF4Config()).eval()
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        with fast_generation(model):
            assert near(model(x), expected)
    assert kernel.calls == 1
    assert "2 of 3 NF4 layers" in caplog.text


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (llama, "none that are packed"),
        (lambda: merged(), "Merged layers are dense"),
        (lambda: quantize_model(llama(), NF4Config()), "torch.float32.*dtype=torch.bfloat16"),
        (lambda: quantize_model(nn.Sequential(nn.Linear(64, 31).to(torch.bfloat16)), NF4Config()), "31 × 64"),
    ],
)
def test_models_that_it_cannot_serve_are_refused(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(ValueError, match=said), fast_generation(make()):
        pytest.fail("nothing was served")


def test_layers_elsewhere_than_on_the_cpu_are_refused() -> None:
    elsewhere = SimpleNamespace(weight=torch.empty(0, device="meta"))
    assert "on meta" in generation._obstacle(elsewhere)


def merged() -> nn.Module:
    model = adapted()
    model.merge_adapter()
    return model


def test_a_processor_without_the_kernel_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repacked, "has_avx512bf16", lambda: False)
    model = base()
    with pytest.raises(RuntimeError, match=r"AVX512-BF16.*merge_adapter"), fast_generation(model):
        pytest.fail("nothing was served")
    assert all("repacked" not in layer.__dict__ for layer in layers(model))


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="on cuda"), fast_generation(base().to("cuda")):
        pytest.fail("nothing was served")
