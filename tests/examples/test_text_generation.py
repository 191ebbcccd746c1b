"""The example of text generation: its arguments, what it trains on, what it measures, and going on after a Ctrl-C."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import text_generation as example
import torch
from architectures import llama
from byte_tokenizer import byte_tokenizer


SCRIPT = Path(example.__file__)
SMALL = ("--held-out", "8", "--batch-size", "4", "--max-length", "200")


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def given(tmp_path: Path) -> tuple[str, ...]:
    """Options that name a tiny model and a hundred chats."""
    torch.manual_seed(0)
    llama(vocab_size=257).save_pretrained(tmp_path / "model")
    byte_tokenizer(chat=True).save_pretrained(tmp_path / "model")
    lines = [json.dumps({"messages": chat(f"{n} + 1 =", str(n + 1))}) for n in range(100)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return ("--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "data.jsonl"), *SMALL)


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def options(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["text_generation.py", *arguments])
    return example.read_options()


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_each_method_has_its_rate(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert options(monkeypatch, "--method", method).learning_rate == example.RATES[method]
    assert options(monkeypatch, "--method", method, "--learning-rate", "1e-4").learning_rate == 1e-4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--method", "lisa"), "--method"),
        (("--steps", "0"), "--steps"),
        (("--learning-rate", "nan"), "--learning-rate"),
        (("--resume", "--output", "nowhere"), "--resume"),
        (("--output", f"{__file__}/below"), "--output"),
        (("--dataset", "not/there.jsonl"), "not/there.jsonl"),
        (("--model", "not/there/at/all"), "not/there/at/all"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...],
    named: str,
    given: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["", *given, "--output", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        example.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("Error: ")
    assert named in said
    assert not (tmp_path / "out").exists()


def test_only_the_answer_and_its_end_have_labels() -> None:
    tokenizer = byte_tokenizer(chat=True)
    row = example.encode(tokenizer, chat("1 + 1 =", "two"))
    labelled = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0]
    assert tokenizer.decode(labelled) == "two<|end|>"
    assert tokenizer.decode(row["input_ids"][: row["start"]]) == "user: 1 + 1 =<|end|>assistant: "
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_padding_has_no_labels() -> None:
    tokenizer = byte_tokenizer(chat=True)
    batch = example.collate([example.encode(tokenizer, chat("?", answer)) for answer in ("a", "abcdef")])
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"] >= 0).sum(1).tolist() == [2, 7]  # and the end of each


def test_held_out_questions_are_not_trained_on(given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, parts = byte_tokenizer(chat=True), []
    for split in ("test", "validation"):
        chosen = options(monkeypatch, *given, "--split", split)
        parts += [{str(row["input_ids"]) for row in rows} for rows in example.choose_rows(chosen, tokenizer)]
    train, test, train_again, validation = parts
    assert train == train_again
    assert (len(test), len(validation), len(train)) == (8, 8, 84)
    assert not train & (test | validation)
    assert not test & validation


def test_perplexity_is_that_of_each_token(given: tuple[str, ...]) -> None:
    """Against a sum of log-probabilities, one row at a time in float64."""
    model, tokenizer = llama(vocab_size=257), byte_tokenizer(chat=True)
    rows = [example.encode(tokenizer, chat("?" * n, "ab" * n)) for n in (1, 5, 3)]
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logs = model(ids).logits[0].double().log_softmax(-1)
        for place in range(row["start"], ids.shape[1]):
            total, count = total - logs[place - 1, ids[0, place]].item(), count + 1
    # float32 in batches that are padded: sums in another order
    assert example.perplexity(model, rows, batch_size=2) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_answers_come_in_the_order_of_the_rows() -> None:
    """Batched with padding on the left, each is the one that it is alone."""
    torch.manual_seed(0)
    model, tokenizer = llama(vocab_size=257), byte_tokenizer(chat=True)
    rows = [example.encode(tokenizer, chat("x" * n, "abcdefgh")) for n in (9, 2, 30, 5)]
    together = example.generate(model, tokenizer, rows, batch_size=3)
    assert together == [example.generate(model, tokenizer, [row])[0] for row in rows]
    assert len(set(together)) > 1


def test_scores() -> None:
    assert example.scores([" a b c d", "x"], ["a b c d", "y"])["exact_match"] == 50
    assert example.scores(["a b c d e"], ["a b c d e"])["bleu"] == pytest.approx(100)
    # By hand: precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty
    by_hand = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert example.scores(["a b c d x"], ["a b c d e"])["bleu"] == pytest.approx(by_hand)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_both_trainers_share_one_loss_trajectory(method: str, given: tuple[str, ...], tmp_path: Path) -> None:
    losses = {}
    for trainer in ("transformers", "trl"):
        file = tmp_path / f"{trainer}.json"
        where = ("--output", str(tmp_path / trainer), "--json", str(file))
        process = start(*given, *where, "--method", method, "--trainer", trainer, "--steps", "4")
        said, _ = process.communicate()
        assert process.returncode == 0, said
        found = json.loads(file.read_text())
        losses[trainer] = found["losses"]
        assert method == "full" or "## Results" in (tmp_path / trainer / "README.md").read_text(encoding="utf-8")
    # bfloat16 products in layers; the two compute the loss over the vocabulary in another order
    assert losses["trl"] == pytest.approx(losses["transformers"], rel=5e-3)
    assert len(losses["trl"]) == 4


@pytest.mark.slow
def test_an_interrupted_run_goes_on(given: tuple[str, ...], tmp_path: Path) -> None:
    folder, file = tmp_path / "out", tmp_path / "found.json"
    where = (*given, "--output", str(folder), "--steps", "400", "--method", "lora")
    process = start(*where)
    assert process.stdout is not None
    for line in process.stdout:
        if "'loss'" in line:
            break
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130, said
    assert "--resume goes on from it" in said.splitlines()[-1]
    step = max(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))
    assert 0 < step < 400
    again = start(*where)
    assert "add --resume" in again.communicate()[0].splitlines()[-1]
    assert again.returncode == 2
    other = start(*where, "--resume", "--rank", "4")
    assert "rank=16" in other.communicate()[0].splitlines()[-1]
    assert other.returncode == 2
    resumed = start(*where, "--resume", "--json", str(file))
    said = resumed.communicate()[0]
    assert resumed.returncode == 0, said
    assert len(json.loads(file.read_text())["losses"]) == 400 // (400 // 12)
