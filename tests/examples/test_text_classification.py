"""examples/text_classification.py: what it refuses, how it splits and scores, and that a stopped run goes on."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import text_classification as example
import torch
import transformers as tf
from byte_tokenizer import byte_tokenizer

from hf_qlora.bench.measure import environment as device_and_versions
from hf_qlora.bench.results import read_lines


SCRIPT = Path(example.__file__)
RESULTS = SCRIPT.parents[1] / "results" / "text_classification.jsonl"
SMALL = ("--rows", "300", "--device", "cpu")


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reviews(count: int = 60) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": ("good", "bad", "none")[i % 3]} for i in range(count)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no texts"),
        ([{"text": f"text {i}", "label": 1} for i in range(40)], "one class"),
        ([{"text": f"text {i}"} for i in range(40)], "'label'"),
        ([{"text": f"text {i}", "label": 0.5} for i in range(40)], "whole number"),
        ([{"words": "a", "label": 1}], "'text'"),
        (["a", "b"], "JSON object"),
        ([*reviews(30), {"text": "alone", "label": "rare"}], "'rare'"),
    ],
)
def test_data_that_nothing_can_be_learned_from_is_refused(
    rows: list[Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "rows.jsonl", rows)
    assert example.main(["--dataset", str(file), "--output", str(tmp_path / "output")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "missing.jsonl"), "missing.jsonl"),
        (("--dataset", "nobody/nothing"), "nobody/nothing"),
        (("--dataset", "empty"), "no files"),
        (("--dataset", "broken.jsonl"), "line 1 is not JSON"),
        (("--dataset", "binary.jsonl"), "UTF-8"),
        (("--dataset", "good.jsonl", "--model", "./nothing"), "./nothing"),
        (("--dataset", "good.jsonl", "--output", "good.jsonl"), "cannot be written"),
        (("--dataset", "good.jsonl", "--resume"), "no whole checkpoint"),
        (("--dataset", "good.jsonl", "--device", "cuda"), "no GPU"),
    ],
)
def test_what_is_not_there_is_refused(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("empty").mkdir()
    Path("broken.jsonl").write_text("{", encoding="utf-8")
    Path("binary.jsonl").write_bytes(b"\xff\xfe\x00")
    written(Path("good.jsonl"), reviews())
    assert example.main([*arguments, "--json", "found.json"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(Path().glob("text-classification*"))
    assert not Path("found.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--steps", "0"),
        ("--method", "magic"),
        ("--seed", "x"),
        ("--patience", "-1"),
        ("--learning-rate", "-1"),
        ("--learning-rate", "inf"),
        ("--rank", "4", "--method", "full"),
    ],
)
def test_arguments_that_are_none_end_with_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        example.parse(list(arguments))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert arguments[0] in said
    assert said.count("\n") == 1


def test_each_method_has_its_learning_rate() -> None:
    for method, rate in example.LEARNING_RATES.items():
        assert example.parse(["--method", method]).learning_rate == rate
    assert example.parse(["--learning-rate", "0.5"]).learning_rate == 0.5


def test_splits_have_nothing_in_common_and_are_the_same_for_every_seed(tmp_path: Path) -> None:
    repeated = [*reviews(600), *reviews(100)]
    file = written(tmp_path / "rows.jsonl", repeated)
    found = []
    for seed in ("0", "1"):
        texts = example.read(example.parse(["--dataset", str(file), "--seed", seed]))
        found.append(example.split(texts.rows))
    assert found[0] == found[1]
    parts = [{text for text, _ in part} for part in found[0].values()]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 600
    assert texts.names == ["bad", "good", "none"]
    for part in found[0].values():
        shares = np.bincount([label for _, label in part]) / len(part)
        assert np.abs(shares - 1 / 3).max() < 0.02  # parts of 60 and more, rounded to whole texts


def test_a_folder_and_other_columns_are_read(tmp_path: Path) -> None:
    rows = [{"body": row["text"], "stars": i % 2} for i, row in enumerate(reviews())]
    written(tmp_path / "a.jsonl", rows[:30])
    (tmp_path / "b.json").write_text(json.dumps(rows[30:]), encoding="utf-8")
    options = ["--dataset", str(tmp_path), "--text-column", "body", "--label-column", "stars"]
    texts = example.read(example.parse(options))
    assert sorted(texts.rows) == sorted((row["body"], row["stars"]) for row in rows)
    assert texts.names == ["0", "1"]


def test_scores_are_those_counted_by_hand() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 4.0]])  # classes 0, 1, 0, 1
    found = example.scores(SimpleNamespace(predictions=logits, label_ids=np.array([0, 1, 1, 1])))
    # class 0: precision 1/2, recall 1, F1 2/3; class 1: precision 1, recall 2/3, F1 4/5
    assert found == {"accuracy": 0.75, "macro_f1": pytest.approx((2 / 3 + 4 / 5) / 2, rel=1e-12)}


# ---- heads, on tiny models without one

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
HEADLESS = {
    "distilbert": lambda: tf.DistilBertModel(
        tf.DistilBertConfig(dim=64, hidden_dim=128, n_layers=2, n_heads=2, vocab_size=300, pad_token_id=0)
    ),
    "roberta": lambda: tf.RobertaModel(
        tf.RobertaConfig(**SIZES, vocab_size=300, pad_token_id=0, max_position_embeddings=80), add_pooling_layer=False
    ),
    "bert": lambda: tf.BertModel(tf.BertConfig(**SIZES, vocab_size=300), add_pooling_layer=False),
    "llama": lambda: tf.LlamaModel(tf.LlamaConfig(**SIZES, vocab_size=300, num_key_value_heads=2)),
}
HEADS = {
    "distilbert": ["classifier", "pre_classifier"],
    "roberta": ["classifier"],
    "bert": ["bert.pooler.dense", "classifier"],
    "llama": ["score"],
}


@pytest.fixture(params=sorted(HEADLESS))
def headless(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    folder = tmp_path / "base"
    HEADLESS[request.param]().save_pretrained(folder)
    byte_tokenizer(pair=request.param != "llama").save_pretrained(folder)
    return request.param, folder


@pytest.mark.parametrize("method", ["qlora", "adaptive-depth", "full"])
def test_every_new_module_is_trained_whole_and_never_quantized(headless: tuple[str, Path], method: str) -> None:
    name, folder = headless
    options = example.parse(["--model", str(folder), "--method", method, "--device", "cpu"])
    _, _, model, head = example.load(options, ["a", "b", "c"])
    assert head == HEADS[name]
    new = {key for key, _ in model.named_parameters() if key.startswith(tuple(f"{module}." for module in head))}
    model, found = example.adapted(model, head, options)
    trained = {key.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for key in found["head"]}
    assert trained == new
    assert set(found["head"].values()) == {"torch.float32"}
    quantized = [path for path, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert bool(quantized) == (method == "qlora")
    assert not [path for path in quantized if any(module in path for module in head)]


@pytest.mark.parametrize("name", ["distilbert"])
def test_the_documented_commands_run_in_their_order(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    HEADLESS[name]().save_pretrained(tmp_path / "base")
    byte_tokenizer(pair=True).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "rows.jsonl", reviews(200))
    shared = ["--model", "base", "--dataset", "rows.jsonl", "--steps", "2", "--batch-size", "4", "--device", "cpu"]
    for method in example.LEARNING_RATES:
        assert example.main([*shared, "--method", method, "--json", f"{method}.json"]) == 0
        found = json.loads(Path(f"{method}.json").read_text())
        output = Path(f"text-classification-{method}")
        assert found["saved_bytes"] == sum(file.stat().st_size for file in output.glob("*model.safetensors"))
        assert found["reload_difference"] < 1e-4  # float32, with folded scales rounded once more
        assert (output / "README.md").is_file()
        assert found["versions"].keys() == {"scikit-learn", "accelerate"}
        assert found["resumed_at_step"] is None
    into_another = ["--method", "full", "--output", "text-classification-qlora"]
    assert example.main([*shared, *into_another]) == 2


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that name a tiny model and two hundred texts, in a folder to work in."""
    monkeypatch.chdir(tmp_path)
    HEADLESS["bert"]().save_pretrained("base")
    byte_tokenizer(pair=True).save_pretrained("base")
    written(Path("rows.jsonl"), reviews(200))
    few = ["--steps", "2", "--batch-size", "4", "--method", "lora", "--device", "cpu"]
    return ["--model", "base", "--dataset", "rows.jsonl", "--output", "out", *few]


def cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}', encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut_off, "cut off or damaged"),
        (without_tokenizer, "has no tokenizer"),
        (adapter, "is an adapter of me/base"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: folder.rename("away"), "--model ./base is not there"),
    ],
)
def test_a_model_that_is_not_whole_is_one_sentence(
    spoil: Any, said: str, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(Path("base"))
    assert example.main([*given, "--model", "./base"]) == 2
    found = capsys.readouterr().err
    assert said in found
    assert found.count("\n") == 1
    assert not Path("out").exists()


def test_a_card_and_settings_of_somebody_else_stay(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    for name in ("README.md", "settings.json"):
        Path("out", name).write_text("mine", encoding="utf-8")
    assert example.main([*given, "--method", "full"]) == 2
    assert "out has a settings.json and a README.md of another origin" in capsys.readouterr().err
    assert {file.read_text(encoding="utf-8") for file in Path("out").iterdir()} == {"mine"}


def test_a_run_does_not_go_on_with_other_data_or_weights(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(example, "finish", stopped)
        assert example.main(given) == 130
    rows, weights = Path("rows.jsonl"), Path("base/model.safetensors")
    for file, said in ((rows, "the data of the run in out changed"), (weights, "the model of the run in out changed")):
        before = file.read_bytes()
        file.write_bytes(before.replace(b"text 7", b"text x") if file is rows else before[:-1] + b"?")
        capsys.readouterr()
        assert example.main([*given, "--resume"]) == 2
        assert said in capsys.readouterr().err
        file.write_bytes(before)
    assert example.main([*given, "--resume"]) == 0
    assert example.main([*given, "--resume"]) == 2
    assert "is finished" in capsys.readouterr().err
    rows.rename("others.jsonl")
    assert example.main([*given, "--dataset", "others.jsonl"]) == 2
    assert "another result (dataset='rows.jsonl')" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_is_made_again_in_its_own_folder(method: str, given: list[str]) -> None:
    """Its card and settings are known as its own."""
    for _ in range(2):
        assert example.main([*given, "--method", method]) == 0


# ---- whole runs, on MiniLM


def command(folder: Path, *arguments: str) -> list[str]:
    where = ("--output", str(folder / "output"), "--json", str(folder / "found.json"))
    return [sys.executable, str(SCRIPT), *SMALL, *where, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(example.LEARNING_RATES))
def test_each_method_runs_to_its_end(method: str, tmp_path: Path) -> None:
    run = subprocess.run(
        command(tmp_path, "--method", method, "--steps", "4"), env=environment(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["correct"].count("1") / len(found["correct"]) == pytest.approx(found["test"]["accuracy"], abs=1e-9)
    assert set(found["head"].values()) == {"torch.float32"}
    assert any("classifier" in name for name in found["head"])
    assert found["reload_difference"] < 1e-4  # float32, with folded scales rounded once more
    assert (found["base_bytes"] < 0.62 * found["dense_bytes"]) == (method == "qlora")
    output = tmp_path / "output"
    assert (output / "confusion_matrix.png").stat().st_size > 5000
    assert "accuracy" in (output / "README.md").read_text()
    labels = json.loads((output / ("config.json" if method == "full" else "adapter_config.json")).read_text())
    assert "sarcastic" in json.dumps(labels)
    assert not list(output.glob("checkpoint-*"))


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_the_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run(command(whole, "--steps", "40"), env=environment(), check=True, capture_output=True)
    stopped = subprocess.Popen(
        command(parts, "--steps", "40"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "said.txt").open("w"),
        text=True,
    )
    assert stopped.stdout is not None
    for line in stopped.stdout:
        if "'loss'" in line:  # it trains
            break
    stopped.send_signal(signal.SIGINT)
    stopped.communicate(timeout=120)
    said = (tmp_path / "said.txt").read_text()
    assert stopped.returncode == 130
    assert "--resume" in said
    assert list((parts / "output").glob("checkpoint-*"))
    again = subprocess.run(command(parts, "--steps", "40"), env=environment(), capture_output=True, text=True)
    assert again.returncode == 2  # a stopped run is not written over
    other = subprocess.run(
        command(parts, "--steps", "41", "--resume"), env=environment(), capture_output=True, text=True
    )
    assert other.returncode == 2
    assert "steps" in other.stderr
    subprocess.run(command(parts, "--steps", "40", "--resume"), env=environment(), check=True, capture_output=True)
    found = [json.loads((folder / "found.json").read_text()) for folder in (whole, parts)]
    assert found[0]["correct"] == found[1]["correct"]
    assert found[0]["test"]["loss"] == pytest.approx(found[1]["test"]["loss"], abs=1e-6)  # float32, on one thread


@pytest.mark.slow
def test_a_recorded_run_is_made_again(tmp_path: Path) -> None:
    """Its log and every answer, bit for bit, on the processor that it was recorded on; elsewhere within the seeds'."""
    rows = [row for row in read_lines(RESULTS) if row["part"] == "runs"]
    recorded = {row["seed"]: row for row in rows if row["arm"] == "qlora"}
    row, where = recorded[1], ("--output", str(tmp_path / "output"), "--json", str(tmp_path / "found.json"))
    given = [sys.executable, str(SCRIPT), *row["arguments"], "--seed", "1", "--device", "cpu", *where]
    run = subprocess.run(given, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    accuracies = [one["found"]["test"]["accuracy"] for one in recorded.values()]
    assert abs(found["test"]["accuracy"] - row["found"]["test"]["accuracy"]) <= 2 * statistics.stdev(accuracies)
    here = device_and_versions("cpu")
    if all(row["with"][name] == here[name] for name in ("device", "capability", "torch", "bitsandbytes")):
        assert found["log"] == row["found"]["log"]
        assert found["correct"] == row["found"]["correct"]
