"""A model whose loss is computed in chunks is the same model: loss, gradients, logits, files.

Oracle: the same model without it, and cross entropy written out over its logits.
"""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
import trl
from architectures import LLAMA_LIKE, SIZES, VOCAB, bert, gpt2, llama
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_qlora import NF4Config, QLoRAConfig, disable_chunked_loss, enable_chunked_loss
from hf_qlora.kernels import loss
from hf_qlora.layers import logits
from hf_qlora.layers.head import ChunkedHead
from hf_qlora.layers.logits import LazyLogits
from hf_qlora.quant.linear4bit import Linear4bit, become_linear4bit
from hf_qlora.quant.packing import quantize_weight
from hf_qlora.validation import ConfigError


# The order of sums over chunks differs: a few roundings of float32, relative to the largest gradient of a tensor; and
# a floor for gradients that are remainders of larger terms (key biases).
ROUNDING, FLOOR = 1e-5, 1e-6
ROWS = 4


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", ROWS * VOCAB * 4)
    logits._said.clear()


def test_a_class_that_others_put_before_it_stays() -> None:
    """As `fully_shard` does: disabling makes the head what it was, and enabling brings the chunks back."""
    model = llama().train()
    ids = torch.arange(8)[None]
    enable_chunked_loss(model)
    model.lm_head.__class__ = top = type("FSDPLinear", (type(model.lm_head),), {})
    for _ in range(2):
        assert isinstance(model(ids).logits, LazyLogits)
        assert disable_chunked_loss(model)
        assert not disable_chunked_loss(model)
        assert not isinstance(model(ids).logits, LazyLogits)
        assert type(model.lm_head) is top
        enable_chunked_loss(model)
        assert type(model.lm_head) is top


def t5() -> nn.Module:
    sizes = {"d_model": 128, "d_ff": 256, "num_layers": 2, "num_heads": 4, "d_kv": 32}
    return tf.T5ForConditionalGeneration(
        tf.T5Config(**sizes, vocab_size=VOCAB, decoder_start_token_id=0, pad_token_id=0)
    )


def bart() -> nn.Module:
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = tf.BartConfig(d_model=64, vocab_size=VOCAB, forced_eos_token_id=2, **sides, **heads, **tokens)
    model = tf.BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "gemma2 (softcap)": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**LLAMA_LIKE, head_dim=32)),
    "cohere (scale)": lambda: tf.CohereForCausalLM(tf.CohereConfig(**LLAMA_LIKE, bos_token_id=1, eos_token_id=2)),
    "granite (divisor)": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**LLAMA_LIKE, logits_scaling=3.0)),
    "gpt2 (tied)": lambda: gpt2(bos_token_id=1, eos_token_id=1),
    "t5": t5,
    "bart (constant row)": bart,
    "bert (biased)": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES, vocab_size=VOCAB)),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    return model


def batch(**more: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 16))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels, **more}


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**inputs).loss
    out.backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


Result = tuple[Tensor, dict[str, Tensor]]  # of a step: the loss, and gradients by name


def assert_same(one: Result, other: Result, factor: float = 1) -> None:
    assert abs(float(one[0] - other[0])) <= factor * ROUNDING * abs(float(other[0]))
    assert one[1].keys() == other[1].keys()
    assert one[1]
    for name, grad in other[1].items():
        assert float((one[1][name] - grad).abs().max()) <= factor * (ROUNDING * float(grad.abs().max()) + FLOOR), name


class Largest(TorchDispatchMode):
    """The most rows of logits that anything within has."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if not isinstance(tensor, Tensor) or isinstance(tensor, LazyLogits) or tensor.is_meta:
                continue
            weight = tuple(tensor.shape[:-1]) in ((128,), (64,))  # transposed
            if tensor.ndim and tensor.shape[-1] == VOCAB and not weight:
                self.rows = max(self.rows, tensor.numel() // VOCAB)
        return result


@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": torch.tensor(40)}, {"num_items_in_batch": 40}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_full_logits_which_are_never_made(name: str, more: dict[str, Any]) -> None:
    if more and name in ("t5", "bart (constant row)", "bert (biased)"):  # their losses take none
        more = {}
    model, inputs = make(name), batch(**more)
    expected, full = step(model, inputs), model(**inputs).logits.detach()
    enable_chunked_loss(model)
    with Largest() as largest:
        found = step(model, inputs)
    assert 0 < largest.rows <= ROWS
    assert_same(found, expected)
    out = model(**inputs)
    assert type(out.logits) is LazyLogits
    assert torch.equal(out.logits.detach(), full)
    out.loss.backward()


def adapted(name: str = "llama", **settings: Any) -> PeftModel:
    values = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "quantization": None}
    return get_peft_model(make(name), QLoRAConfig(**{**values, **settings})).train()


ADAPTED: dict[str, dict[str, Any]] = {
    "frozen head": {},
    "adapted head": {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False},
    "DoRA head": {"target_modules": ["lm_head"], "use_dora": True, "init_lora_weights": False},
    "trained head": {"modules_to_save": ["lm_head"]},
    "4-bit base": {"quantization": {}},
    "4-bit adapted head": {"quantization": {}, "target_modules": ["lm_head"], "init_lora_weights": False},
}


@pytest.mark.parametrize("case", ADAPTED)
def test_adapted_models_have_it_by_default(case: str) -> None:
    model, inputs = adapted(**ADAPTED[case]), batch()
    with Largest() as largest:
        found = step(model, inputs)
    assert 0 < largest.rows <= ROWS
    assert disable_chunked_loss(model)
    assert_same(found, step(model, inputs), factor=10)  # DoRA's norms and 4-bit products: more terms


def test_a_packed_head_is_unpacked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make("llama").requires_grad_(False), batch()
    model.model.norm.weight.requires_grad_(True)
    packed, state = quantize_weight(model.lm_head.weight.data, NF4Config())
    become_linear4bit(model.lm_head, packed, state, None)
    expected, unpacked = step(model, inputs), []
    monkeypatch.setattr(Linear4bit, "product_weight", lambda self, dtype: unpacked.append(1) or UNPACK(self, dtype))
    enable_chunked_loss(model)
    with Largest() as largest:
        assert_same(step(model, inputs), expected)
    assert largest.rows <= ROWS
    assert len(unpacked) == 1


UNPACK = Linear4bit.product_weight


class Square(torch.autograd.Function):
    """Somebody's own Function, which reads logits below torch's Python functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x**2).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * 2 * x / x.numel()


def masked(x: Tensor, labels: Tensor) -> Tensor:
    x[..., 3] = -5.0
    x /= 2.0
    return F.cross_entropy(x.view(-1, VOCAB), labels.view(-1))


READERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "log_softmax": lambda x, labels: -x.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).mean(),
    "own Function": lambda x, labels: Square.apply(x),
    "by class": lambda x, labels: x[..., 7].sum() + x[:, 2:4, :5].square().sum(),
    "soft targets": lambda x, labels: F.cross_entropy(x.view(-1, VOCAB), torch.ones(32, VOCAB) / VOCAB),
    "each row's": lambda x, labels: F.cross_entropy(x.view(-1, VOCAB), labels.view(-1), reduction="none").sum(),
    "both": lambda x, labels: F.cross_entropy(x.view(-1, VOCAB), labels.view(-1)) + x.square().mean(),
    "read before": lambda x, labels: x.detach().mean() + F.cross_entropy(x.view(-1, VOCAB), labels.view(-1)),
    "old shift": lambda x, labels: F.cross_entropy(
        x[..., :-1, :].contiguous().view(-1, VOCAB), labels[:, 1:].reshape(-1)
    ),
    "mask": lambda x, labels: F.cross_entropy(x[labels != -100].float(), labels[labels != -100]),
    "weights": lambda x, labels: nn.CrossEntropyLoss(torch.linspace(1, 2, VOCAB))(x.flatten(0, 1), labels.flatten()),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", ["frozen head", "adapted head", "trained head"])
def test_whoever_reads_logits_gets_real_ones_with_their_gradients(case: str, reader: str) -> None:
    model, inputs = adapted(**ADAPTED[case]), batch()

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        value = READERS[reader](model(input_ids=inputs["input_ids"]).logits, inputs["labels"])
        value.backward()
        return value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    found = run()
    assert disable_chunked_loss(model)
    assert_same(found, run())


@pytest.mark.parametrize("case", ["frozen head", "trained head"])
def test_logits_changed_in_place_are_real_from_then_on(case: str) -> None:
    model, inputs = adapted(**ADAPTED[case]), batch()

    def run() -> Result:
        model.zero_grad()
        value = masked(model(input_ids=inputs["input_ids"]).logits, inputs["labels"])
        value.backward()
        return value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    found = run()
    disable_chunked_loss(model)
    assert_same(found, run())


@pytest.mark.parametrize("case", ["frozen head", "adapted head", "4-bit base"])
def test_under_autocast_products_and_results_have_its_dtype(case: str) -> None:
    model, inputs = adapted(**ADAPTED[case]), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, lazy = step(model, inputs), model(**inputs).logits
        read = lazy.detach()
    below = Square.apply(lazy)  # outside
    disable_chunked_loss(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, full = step(model, inputs), model(**inputs).logits
    assert lazy.dtype == full.dtype
    assert torch.equal(read, full)
    assert torch.equal(below, Square.apply(full))
    assert found[0].dtype == expected[0].dtype
    # bfloat16 logits, on both sides: the loss differs by roundings, gradients by those of narrow products in backward
    assert abs(float(found[0] - expected[0])) < 1e-2
    for name, grad in expected[1].items():
        assert float((found[1][name] - grad).abs().max()) <= 3e-2 * float(grad.abs().max()) + 1e-4, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, inputs = adapted(), batch()
    expected = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(step(model, inputs), expected)


def test_the_whole_model_may_be_checkpointed() -> None:
    model, inputs = adapted(**ADAPTED["adapted head"]), batch()
    expected = step(model, inputs)
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(lambda: model(**inputs).loss, use_reentrant=False).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same((expected[0], grads), expected)


def test_in_eval_without_gradients_and_in_generation_nothing_is_lazy() -> None:
    model, inputs = adapted(), batch()
    with torch.no_grad():
        assert type(model(**inputs).logits) is Tensor
    model.eval()
    assert type(model(**inputs).logits) is Tensor
    found = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
    disable_chunked_loss(model)
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False), found)


@pytest.mark.parametrize("sequences", [1, 8])
def test_the_last_position_costs_no_copy_of_the_weight(sequences: int) -> None:
    """torch multiplies sequence by sequence where a frozen weight meets an input with gaps, which such a slice has.

    That is a bmm, which copies the weight for several sequences, and within itself in bfloat16 for one.
    """
    model, ids = adapted(), batch()["input_ids"][:1].repeat(sequences, 1)
    weight, largest, batched = model.lm_head.weight, 0, []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            if function is torch.ops.aten.bmm.default:
                batched.extend(arg for arg in args if arg.data_ptr() == weight.data_ptr())
            return result

    with torch.no_grad(), Products():
        found = model.eval()(input_ids=ids, logits_to_keep=1).logits
    assert not batched
    assert largest <= weight.numel()
    assert torch.allclose(found, model(input_ids=ids).logits[:, -1:], atol=1e-5)  # products of another shape


@pytest.mark.parametrize("case", ADAPTED)
def test_copies_pickles_and_files(case: str, tmp_path: Path) -> None:
    model, inputs = adapted(**ADAPTED[case]), batch()
    expected, names = step(model, inputs), list(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert any(isinstance(module, ChunkedHead) for module in other.modules())
        assert_same(step(other, inputs), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True).train()
    assert_same((step(loaded, inputs)[0], expected[1]), expected)
    assert disable_chunked_loss(loaded)
    disable_chunked_loss(model)
    assert list(model.state_dict()) == names


def test_unloading_gives_the_head_its_class_back() -> None:
    for case in ADAPTED:
        for merge in (True, False):
            model = adapted(**ADAPTED[case])
            base = model.merge_and_unload() if merge else model.unload()
            assert not any(isinstance(module, ChunkedHead) for module in base.modules()), case
            assert type(base.lm_head) is nn.Linear


def test_it_can_be_left_out_and_is_no_business_of_stock_readers(tmp_path: Path) -> None:
    model = adapted(chunked_loss=False)
    assert not disable_chunked_loss(model)
    model.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).chunked_loss is False
    portable = model.peft_config["default"].to_portable_dict()
    assert "chunked_loss" not in portable
    del portable["hf_qlora"]["chunked_loss"]  # as written before there was such a field
    assert QLoRAConfig.from_portable_dict(portable).chunked_loss is True
    assert not disable_chunked_loss(PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True))


def test_enabling_twice_is_enabling_once_and_a_stock_adapter_keeps_it() -> None:
    model, inputs = make("llama"), batch()
    enable_chunked_loss(model)
    enable_chunked_loss(model)
    assert type(model.lm_head).__mro__.count(ChunkedHead) == 1
    assert isinstance(model.lm_head, nn.Linear)
    assert type(model.lm_head).__name__ == "Linear"
    tuned = get_peft_model(model, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")).train()
    found = step(tuned, inputs)
    assert isinstance(tuned.get_base_model().lm_head, ChunkedHead)
    disable_chunked_loss(tuned)
    assert_same(found, step(tuned, inputs))


def test_models_without_a_vocabulary_are_refused_by_name_and_passed_over_by_default() -> None:
    with pytest.raises(ConfigError, match="BertForSequenceClassification has no output head"):
        enable_chunked_loss(bert())
    model = get_peft_model(bert(), QLoRAConfig(target_modules=["query"], task_type="SEQ_CLS", quantization=None))
    assert not disable_chunked_loss(model)


def test_logits_are_not_made_of_a_head_that_has_changed_since() -> None:
    model, inputs = adapted(**ADAPTED["trained head"]), batch()
    for fused in (True, False):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=fused)
        out = model(**inputs)
        out.loss.backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="has changed"):
            out.logits.argmax(-1)


def test_with_the_adapter_off_logits_are_those_without_it_whenever_read() -> None:
    model, inputs = adapted(**ADAPTED["adapted head"]), batch()
    with model.disable_adapter():
        out = model(**inputs)
    plain = make("llama")
    assert torch.equal(out.logits, plain(**inputs).logits)


def test_reading_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = adapted(), batch()
    with caplog.at_level(logging.INFO, "hf_qlora"):
        model(**inputs)
        assert not caplog.records
        for _ in range(2):
            with torch.no_grad():
                pass
            model(**inputs).logits.sum()
            out = model(**inputs)
            with torch.no_grad():
                out.logits.sum()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_nothing_is_kept_after_backward() -> None:
    model, inputs = adapted(**ADAPTED["adapted head"]), batch()
    kept: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(**inputs)
    hidden = out.logits.hidden
    out.loss.backward()
    gc.collect()
    own = {id(p) for p in (*model.parameters(), *model.buffers(), *inputs.values(), hidden)}
    alive = [tensor for ref in kept if (tensor := ref()) is not None and id(tensor) not in own]
    assert not [t for t in alive if t.numel() >= hidden.numel() and t.data_ptr() != hidden.data_ptr()]


def test_compiled_models_are_as_before() -> None:
    model, inputs = make("llama"), batch()
    expected = step(model, inputs)
    enable_chunked_loss(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    out = compiled(**inputs)
    assert abs(float(out.loss - expected[0])) <= ROUNDING * float(expected[0])


def test_two_threads() -> None:
    model, inputs = adapted(), batch()
    expected, found = float(step(model, inputs)[0]), []
    threads = [threading.Thread(target=lambda: found.append(float(model(**inputs).loss))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 2


ROWS_OF_TEXT = [{"input_ids": list(range(3, 19)), "labels": list(range(3, 19))} for _ in range(4)]


def test_trainer_has_real_logits_for_metrics_and_smoothing(tmp_path: Path) -> None:
    data, seen = datasets.Dataset.from_list(ROWS_OF_TEXT), []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"accuracy": 0.0}

    losses = {}
    for chunked in (True, False):
        for smoothing in (0.0, 0.1):
            model = adapted(chunked_loss=chunked)
            settings = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"}
            arguments = tf.TrainingArguments(tmp_path, use_cpu=True, label_smoothing_factor=smoothing, **settings)
            trainer = tf.Trainer(model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=metrics)
            losses[chunked, smoothing] = trainer.train().training_loss
            trainer.evaluate()
    assert seen == [(4, 16, VOCAB)] * 4
    for smoothing in (0.0, 0.1):
        assert losses[True, smoothing] == pytest.approx(losses[False, smoothing], rel=1e-5)


def test_trls_fused_head_is_left_alone(tmp_path: Path) -> None:
    settings = {"max_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False}
    arguments = trl.SFTConfig(str(tmp_path), max_length=16, dataset_kwargs={"skip_prepare_dataset": True}, **settings)
    config = QLoRAConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", quantization=None)
    data = datasets.Dataset.from_list(ROWS_OF_TEXT)
    trainer = trl.SFTTrainer(
        make("llama"), arguments, train_dataset=data, processing_class=tokenizer(), peft_config=config
    )
    inputs = {"input_ids": torch.tensor([ROWS_OF_TEXT[0]["input_ids"]])}
    expected = make("llama")(**inputs, labels=inputs["input_ids"]).loss
    assert isinstance(trainer.model.get_base_model().lm_head, ChunkedHead)
    assert trainer.train().training_loss == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("case", ["adapted head", "4-bit adapted head"])
def test_a_fused_head_over_an_adapted_one_is_refused(case: str) -> None:
    with pytest.raises(ConfigError, match=r"weight of lm_head .* Leave lm_head out"):
        adapted(**ADAPTED[case])(**batch(), fused_lm_head=True)


def tokenizer() -> Any:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w0")


# --- what must not pass in silence -----------------------------------------------------------------------------------


def _through_a_view(rows: Tensor) -> Tensor:
    rows.view(-1, VOCAB)[:, 5] = -50.0
    return rows.view(-1, VOCAB)


def _through_a_slice(rows: Tensor) -> Tensor:
    rows[:, :-1].div_(0.1)
    return rows.view(-1, VOCAB)


def _after_a_view(rows: Tensor) -> Tensor:
    view = rows.view(-1, VOCAB)
    rows[..., 5] = -50.0
    return view


@pytest.mark.parametrize("change", [_through_a_view, _through_a_slice, _after_a_view])
def test_a_change_through_a_view_is_seen_or_refused(change: Callable[[Tensor], Tensor]) -> None:
    model, inputs = adapted(), batch()
    with pytest.raises(RuntimeError, match="changed in place"):
        F.cross_entropy(change(model(input_ids=inputs["input_ids"]).logits), inputs["labels"].view(-1))


def test_reading_views_without_changing_them_is_fine() -> None:
    model, inputs = adapted(), batch()
    logits_ = model(input_ids=inputs["input_ids"]).logits
    read = logits_[:, -1].detach().clone(), logits_.view(-1, VOCAB).argmax(-1)
    value = F.cross_entropy(logits_.view(-1, VOCAB), inputs["labels"].view(-1))
    disable_chunked_loss(model)
    plain = model(input_ids=inputs["input_ids"]).logits
    torch.testing.assert_close(value, F.cross_entropy(plain.view(-1, VOCAB), inputs["labels"].view(-1)))
    torch.testing.assert_close(read[0], plain[:, -1])
    assert torch.equal(read[1], plain.view(-1, VOCAB).argmax(-1))


@pytest.mark.parametrize("look", [lambda t: t.retain_grad(), lambda t: t.register_hook(print)])
def test_gradients_that_a_chunked_loss_does_not_give_are_refused(look: Callable[[Tensor], Any]) -> None:
    model, inputs = adapted(), batch()
    outputs = model(**inputs)
    with pytest.raises(RuntimeError, match="chunked_loss=False"):
        look(outputs.logits)
    read = model(input_ids=inputs["input_ids"]).logits  # before a loss they are given
    look(read)
    read.sum().backward()


@pytest.mark.parametrize("module", ["torch.distributed.fsdp._fully_shard._fsdp_state", "deepspeed.runtime.utils"])
def test_hooks_that_are_set_on_all_outputs_are_called_where_backward_begins(module: str) -> None:
    """FSDP and DeepSpeed learn by them that it begins, whichever output it begins at."""
    model, inputs = adapted(), batch()
    for begins_at in ("loss", "logits"):
        outputs, called = model(**inputs), []

        def hook(name: str, called: list[str] = called) -> Callable[[Tensor], None]:
            def call(gradient: Tensor) -> None:
                called.append(name)

            call.__module__ = module
            return call

        outputs.loss.register_hook(hook("loss"))
        outputs.logits.register_hook(hook("logits"))
        if begins_at == "loss":
            outputs.loss.backward()
            assert outputs.logits.made is None
        else:
            outputs.logits.float().square().mean().backward()
        assert called == [begins_at]


def test_reading_in_inference_mode_leaves_training_alone() -> None:
    model, inputs = adapted(), batch()
    logits_ = model(input_ids=inputs["input_ids"]).logits
    with torch.inference_mode():
        logits_.argmax(-1)
    F.cross_entropy(logits_.view(-1, VOCAB), inputs["labels"].view(-1)).backward()


def test_a_head_with_dropout_is_not_lazy() -> None:
    model = adapted(target_modules=["lm_head"], lora_dropout=0.5, quantization=None)
    assert not isinstance(model.train()(input_ids=batch()["input_ids"]).logits, LazyLogits)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_loss_reads_them_too(backend: str) -> None:
    model, inputs = adapted(), batch()

    def value(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(rows.float().view(-1, VOCAB), labels.view(-1)) + rows.float().sum() * 1e-3

    torch._dynamo.reset()
    found = torch.compile(value, backend=backend)(model(input_ids=inputs["input_ids"]).logits, inputs["labels"])
    torch.testing.assert_close(found, value(model(input_ids=inputs["input_ids"]).logits, inputs["labels"]))
    found.backward()


class Sink(torch.autograd.Function):
    """As DDP's: all outputs pass through it, and it must hear of the backward even if none of them is read."""

    heard = False

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        Sink.heard = True
        return grads


@pytest.mark.parametrize("whose", ["the model's loss", "a loss of one's own"])
def test_logits_that_pass_through_a_function_stay_lazy_and_it_hears_of_backward(whose: str) -> None:
    def through(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = batch()
        outputs = model(**inputs)
        model_loss, passed = Sink.apply(outputs.loss, outputs.logits)
        own = F.cross_entropy(passed[:, :-1].reshape(-1, VOCAB).float(), inputs["labels"][:, 1:].flatten())
        value = model_loss if whose == "the model's loss" else own
        model.zero_grad()
        Sink.heard = False
        value.backward()
        assert Sink.heard
        assert getattr(passed, "made", None) is None
        return value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, model = step(make("llama"), batch()), make("llama")
    enable_chunked_loss(model)
    with Largest() as seen:
        assert_same(through(model), expected)
    assert seen.rows <= ROWS


def test_a_clone_is_made_apart() -> None:
    model = make("llama")
    enable_chunked_loss(model)
    out = model(**batch())
    clone = out.logits.clone()
    assert isinstance(clone, LazyLogits)
    assert clone.made is None
    clone.mul_(2)
    torch.testing.assert_close(clone.detach(), 2 * out.logits.detach(), rtol=0, atol=0)


def test_what_was_made_of_them_without_gradients_has_none() -> None:
    model = make("llama")
    enable_chunked_loss(model)
    out = model(**batch())
    with torch.no_grad():
        wide = out.logits.float().view(-1, VOCAB)
    assert not F.cross_entropy(wide, torch.zeros(len(wide), dtype=torch.int64)).requires_grad
