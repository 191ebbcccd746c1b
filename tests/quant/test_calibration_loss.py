"""The loss that calibration is judged by, against transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
from architectures import VOCAB, bert, gpt2, llama
from merging import adapted
from torch import Tensor, nn

from hf_qlora.quant.calibrate import loss
from hf_qlora.quant.calibrate.loss import is_causal_lm, mean_loss, measuring


TOLERANCE = 1e-5  # relative: float32 logits, summed in another order


def ragged(rows: int = 6, length: int = 24) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the right."""
    mask = (torch.arange(length)[None] < torch.randint(4, length + 1, (rows, 1))).long()
    return {"input_ids": torch.randint(1, VOCAB, (rows, length)) * mask, "attention_mask": mask}


def expected(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """Transformers' loss of one batch, of which padding has no labels: the mean over all other targets."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        return float(model.eval()(**inputs, labels=labels).loss)


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 50, 8192])
def test_it_is_transformers_loss_over_all_tokens(make, batch_tokens: int) -> None:
    model, inputs = make(), ragged()
    found = mean_loss(model, inputs, batch_tokens=batch_tokens)
    assert found == pytest.approx(expected(model, inputs), rel=TOLERANCE)


def test_left_padding_counts_no_token_after_padding() -> None:
    model = llama()
    ids = torch.randint(1, VOCAB, (1, 12))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(17) >= 5).long()[None]
    alone = mean_loss(model, {"input_ids": ids})
    # Rotary positions are relative, so that padding before changes rounding alone.
    assert mean_loss(model, {"input_ids": padded, "attention_mask": mask}) == pytest.approx(alone, rel=1e-4)


def test_labels_are_not_what_it_is_about() -> None:
    model, inputs = llama(), ragged()
    assert mean_loss(model, {**inputs, "labels": torch.zeros(6, 3)}) == mean_loss(model, inputs)


def test_an_adapter_counts() -> None:
    torch.manual_seed(0)
    model, inputs = adapted(llama()), ragged()
    with model.disable_adapter():
        without = mean_loss(model, inputs)
    found = mean_loss(model, inputs)
    assert found == pytest.approx(expected(model, inputs), rel=TOLERANCE)
    assert without is not None
    assert abs(found - without) > 1e-3


def test_each_module_keeps_its_mode() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    mean_loss(model, ragged())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert any(before.values())
    assert not all(before.values())


def test_the_logits_of_a_few_rows_are_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, sizes = llama(), ragged(8), []
    model.lm_head.register_forward_hook(lambda module, given, logits: sizes.append(logits.numel() * 4))
    monkeypatch.setattr(loss, "LOGIT_BYTES", 3 * 24 * VOCAB * 4)
    whole = []
    taken = nn.functional.cross_entropy
    monkeypatch.setattr(loss, "BLOCK_BYTES", 5 * VOCAB * 4)
    monkeypatch.setattr(
        nn.functional, "cross_entropy", lambda z, *args, **kwargs: whole.append(len(z)) or taken(z, *args, **kwargs)
    )
    found = mean_loss(model, inputs)
    assert sizes == [3 * 24 * VOCAB * 4, 3 * 24 * VOCAB * 4, 2 * 24 * VOCAB * 4]
    assert max(whole) == 5
    monkeypatch.undo()
    assert found == pytest.approx(expected(model, inputs), rel=TOLERANCE)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    model, inputs = llama().to(torch.bfloat16), ragged()
    with measuring(model):
        logits = model(**inputs).logits[:, :-1].double()
    mask = inputs["attention_mask"]
    counted = (mask[:, 1:] & mask[:, :-1]).bool()
    by_hand = -logits.log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0][counted].mean()
    assert mean_loss(model, inputs) == pytest.approx(float(by_hand), rel=TOLERANCE)


def test_other_models_have_no_such_loss() -> None:
    assert mean_loss(bert(), ragged()) is None
    assert mean_loss(llama(), {"inputs_embeds": torch.zeros(2, 3, 128)}) is None
    assert [is_causal_lm(model) for model in (llama(), gpt2(), adapted(llama()), bert())] == [True, True, True, False]


def test_where_no_token_counts_it_is_nan() -> None:
    inputs = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.eye(2, 4, dtype=torch.long)}
    found = mean_loss(llama(), inputs)
    assert found is not None
    assert math.isnan(found)
