"""The example of text generation: its arguments, what it trains on, what it measures, and going on after a Ctrl-C."""

from __future__ import annotations

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


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that is said."""
    with pytest.raises(SystemExit) as stopped:
        example.main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("Error: ")
    return said


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_each_method_has_its_rate_and_folder(method: str) -> None:
    given = example.read_options(["--method", method])
    assert given.learning_rate == example.LEARNING_RATES[method]
    assert given.output == Path(f"text-generation-{method}")
    assert example.read_options(["--method", method, "--learning-rate", "1e-4"]).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--method", "lisa"), "--method"),
        (("--steps", "0"), "--steps"),
        (("--learning-rate", "nan"), "--learning-rate"),
        (("--resume", "--output", "nowhere"), "--resume"),
        (("--output", f"{__file__}/below"), "--output"),
        (("--dataset", "not/there.jsonl"), "not/there.jsonl"),
        (("--model", "not/there/at/all"), "--model not/there/at/all is not there"),
        (("--learning-rate", "inf"), "inf is not between 0 and 1"),
        (("--learning-rate", "1"), "1 is not between 0 and 1"),
        (("--method", "full", "--rank", "4"), "--rank 4 is of LoRA"),
        (("--answer-tokens", "2"), "or raise --max-length or --answer-tokens"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...],
    named: str,
    given: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert named in refused(capsys, *given, "--output", str(tmp_path / "out"), *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "file/found.json"])
def test_json_that_cannot_be_written_is_noticed_before_training(
    below: str, given: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    file = str(tmp_path / below)
    assert "cannot be written" in refused(capsys, *given, "--output", str(tmp_path / "out"), "--json", file)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"settings.json"}


def test_texts_beside_chats(given: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "both.jsonl"
    line = json.dumps({"text": "1 + 1", "messages": chat("1 + 1 =", "2")})
    file.write_text("\n".join([line] * 3), encoding="utf-8")
    assert f"{file}#messages" in refused(capsys, *given, "--dataset", str(file))
    assert example.own_chats(f"{file}#messages") == [chat("1 + 1 =", "2")] * 3


def test_what_is_left_out_is_said(given: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "data.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [{"messages": chat("?" * 300, "long")}, {"messages": chat("long", "!" * 50)}, {"text": "alone"}]
    file.write_text("\n".join([*lines, *lines[:6], *map(json.dumps, rows)]), encoding="utf-8")
    options = example.read_options([*given, "--output", str(tmp_path / "out")])
    said: list[str] = []
    train, test = example.choose_rows(options, byte_tokenizer(chat=True), say=said.append)
    assert (len(train), len(test)) == (84, 8)
    assert said == [
        "1 rows of data.jsonl are no chats, and left out",
        "108 chats read: 2 left out as longer than --max-length 200 or with answers of over --answer-tokens 24, "
        "6 asked twice, 8 for validation",
    ]
    assert 108 == 84 + 8 + 2 + 6 + 8
    few = refused(capsys, *given, "--held-out", "49", "--output", str(tmp_path / "out"))
    assert "100 are left, 49 to test, 49 for validation and 2 to train on; needed are 49, 49 and 4" in few
    file.write_text("", encoding="utf-8")
    assert "has no rows" in refused(capsys, *given, "--output", str(tmp_path / "out"))


def test_what_is_no_whole_chat_model_is_refused(
    given: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, where = tmp_path / "model" / "model.safetensors", (*given, "--output", str(tmp_path / "out"))
    before = weights.read_bytes()
    weights.write_bytes(before[:-100])
    assert "cut off or damaged" in refused(capsys, *where)
    weights.write_bytes(before)
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refused(capsys, *where)
    (tmp_path / "model" / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "is an adapter of another model" in refused(capsys, *where)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_run_does_not_go_on_with_other_data(
    given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    own = ("--method", "lora", "--steps", "2", "--device", "cpu", "--output", str(tmp_path / "out"))
    where, file = (*given, *own, "--measure", "trained"), tmp_path / "data.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(example.Measuring, "__call__", stopped)
        with pytest.raises(SystemExit):
            example.main(where)
    before = file.read_text(encoding="utf-8")
    file.write_text(before.replace("7 + 1", "7 + I"), encoding="utf-8")
    assert "the data of the run in" in refused(capsys, *where, "--resume")
    file.write_text(before, encoding="utf-8")
    example.main([*where, "--resume"])
    settings = (tmp_path / "out" / "settings.json").read_bytes()
    assert "would save none" in refused(capsys, *where, "--measure", "perplexity")
    assert (tmp_path / "out" / "settings.json").read_bytes() == settings


def test_no_question_is_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the data have it: what is held out for validation is cut off the same list."""
    pairs = [{"task": "t", "instruction": "add", "prompt": f"{n % 7}", "answer": f"{n}"} for n in range(30)]
    pairs += [{"task": "u", "instruction": "add", "prompt": f"{n}", "answer": ""} for n in range(200)]
    pairs += [{"task": example.LEFT_OUT[0], "instruction": "", "prompt": "", "answer": ""}]
    monkeypatch.setattr(example.assets, "instruction_pairs", lambda split: pairs)
    chats = example.default_chats("train")
    asked = [(messages[0]["content"], messages[1]["content"], len(messages[2]["content"]) > 0) for messages in chats]
    assert len(set(asked)) == len(asked) == 7 + example.OF_A_TASK


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_what_is_measured_is_in_bfloat16_without_autocast(method: str, given: tuple[str, ...], tmp_path: Path) -> None:
    own = ("--method", method, "--steps", "1", "--output", str(tmp_path / "out"), "--device", "cpu")
    options = example.read_options([*given, *own])
    tokenizer, model = example.load(options)
    trainer = example.make_trainer(options, model, tokenizer, *example.choose_rows(options, tokenizer))
    example.trained(options, trainer)
    assert ("forward" in vars(trainer.model)) == (method == "full")  # accelerate's, else this test says nothing
    measured = example.as_measured(trainer)
    assert measured.forward.__func__ is type(measured).forward
    assert "_original_forward" not in vars(measured)
    assert measured(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16
    assert measured(torch.tensor([[1, 2, 3]]), return_dict=False)[0].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_run_again_and_another_method(
    given: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints do not outlive a run; a result is not written over by another method's."""
    folder, file = tmp_path / "out", tmp_path / "new" / "found.json"
    where = (*given, "--output", str(folder), "--device", "cpu", "--steps", "2", "--measure", "trained")
    for _ in range(2):
        example.main([*where, "--json", str(file)])
        assert not list(folder.glob("checkpoint-*"))
    found = json.loads(file.read_text())
    tokens = found["answer_tokens"]
    assert len(tokens) == len(found["trained"]["log_likelihoods"]) == len(found["trained"]["exact"]) == 8
    by_item = math.exp(-sum(found["trained"]["log_likelihoods"]) / sum(tokens))
    # the items are rounded to 4 digits: at most 5e-5 of each, of its two or more tokens
    assert by_item == pytest.approx(found["trained"]["perplexity"], rel=5e-5)
    assert {"base", "nf4"}.isdisjoint(found)
    assert found["versions"].keys() == {"accelerate", "sacrebleu"}
    assert "version:" in found["trained"]["bleu_signature"]
    assert "On the evaluation data (8 examples)" in (folder / "README.md").read_text(encoding="utf-8")
    assert "method='qlora'" in refused(capsys, *where, "--method", "full")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_stopped_while_it_is_measured(
    method: str, given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not trained a step more."""

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    found = {}
    for name in ("whole", "stopped"):
        own = ("--method", method, "--steps", "4", "--measure", "trained", "--device", "cpu")
        where = (*given, *own, "--output", str(tmp_path / name), "--json", str(tmp_path / f"{name}.json"))
        if name == "stopped":
            with monkeypatch.context() as patched:
                patched.setattr(example.Measuring, "__call__", stopped)
                with pytest.raises(SystemExit) as ended:
                    example.main(where)
            assert ended.value.code == 130
            where = (*where, "--resume")
        example.main(where)
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["stopped"]["losses"] == found["whole"]["losses"]
    assert found["stopped"]["trained"] == found["whole"]["trained"]


@pytest.mark.parametrize(
    ("named", "id", "shown"),
    [
        (None, None, "35 tasks of evals' self_prompting"),
        ("me/chats:validation#messages", "me/chats", "me/chats"),
        (f"{__file__}#messages", None, Path(__file__).name),
    ],
)
def test_the_card_names_the_data(
    named: str | None, id: str | None, shown: str, given: tuple[str, ...], tmp_path: Path
) -> None:
    options = example.read_options([*given, "--output", str(tmp_path / "out"), "--device", "cpu", "--steps", "1"])
    tokenizer, model = example.load(options)
    trainer = example.make_trainer(options, model, tokenizer, *example.choose_rows(options, tokenizer))
    options.dataset = named
    card = example.make_card(options, trainer)
    assert (card.dataset, card.dataset_name) == (id, shown)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_base_is_measured_alone(given: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    where = ("--output", str(tmp_path / "out"), "--json", str(file), "--device", "cpu")
    example.main([*given, *where, "--method", "base", "--measure", "trained"])
    found = json.loads(file.read_text())
    assert {"trained", "losses"}.isdisjoint(found)
    assert len(found["base"]["exact"]) == 8
    assert found["nf4"]["perplexity"] != found["base"]["perplexity"]


def test_held_out_questions_are_not_trained_on(given: tuple[str, ...]) -> None:
    tokenizer, parts = byte_tokenizer(chat=True), []
    for split in ("test", "validation"):
        chosen = example.read_options([*given, "--split", split])
        parts += [{str(row["input_ids"]) for row in rows} for rows in example.choose_rows(chosen, tokenizer)]
    train, test, train_again, validation = parts
    assert train == train_again
    assert (len(test), len(validation), len(train)) == (8, 8, 84)
    assert not train & (test | validation)
    assert not test & validation


def test_scores() -> None:
    found = example.scores([" a b c d", "x"], ["a b c d", "y"])
    assert (found["exact_match"], found["exact"]) == (50, "10")
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
def test_an_interrupted_run_goes_on(
    given: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the same end as one that is not interrupted."""
    folder, steps = tmp_path / "out", 100
    few = ("--steps", str(steps), "--save-steps", "10", "--method", "lora", "--measure", "trained", "--device", "cpu")
    where = (*given, *few, "--output", str(folder))
    process = start(*where)
    assert process.stdout is not None
    for line in process.stdout:
        if "'loss'" in line:
            break
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 130, said
    assert "--resume goes on from it" in said.splitlines()[-1]
    assert 0 < max(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")) < steps
    assert "add --resume" in refused(capsys, *where)
    assert "rank=16" in refused(capsys, *where, "--resume", "--rank", "4")
    found = {}
    for name, arguments in (
        ("resumed", (*where, "--resume")),
        ("whole", (*given, *few, "--no-checkpoints", "--output", str(tmp_path / "other"))),
    ):
        process = start(*arguments, "--json", str(tmp_path / name))
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
        found[name] = json.loads((tmp_path / name).read_text())
    assert not list(folder.glob("checkpoint-*"))
    # the same operations on one thread, from a checkpoint in full precision; kept with 4 digits
    for key in ("log_likelihoods", "answers"):
        assert found["resumed"]["trained"][key] == found["whole"]["trained"][key]
