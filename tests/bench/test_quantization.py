"""The suite as a whole: smoke through the command, what it writes, that it goes on, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import bert, gpt2, llama
from typer.testing import CliRunner

import hf_qlora
from hf_qlora import QuantizationBenchmark
from hf_qlora.bench.quantization import latency, memory, settings, train_step
from hf_qlora.bench.quantization.page import html
from hf_qlora.bench.quantization.result import QuantizationResult, check_folder
from hf_qlora.bench.quantization.rows import Row, summary
from hf_qlora.bench.quantization.run import CASES, CaseError
from hf_qlora.cli import app


QUICK = ["precision", "double-quant"]  # cases of a second


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that `--smoke` of all cases wrote, and what it printed."""
    output = tmp_path_factory.mktemp("suite") / "new"
    done = CliRunner().invoke(app, ["bench", "quantization", "--smoke", "--output", str(output)])
    assert done.exit_code == 0, done.output
    return output, done.output


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "quantization", *arguments])


def test_smoke_measures_every_case_and_says_it_means_nothing(smoke: tuple[Path, str]) -> None:
    output, printed = smoke
    found = QuantizationResult.load(output)
    assert list(found.cases) == list(CASES)
    assert all(case.rows and case.environment["code"] for case in found.cases.values())
    assert "whose numbers mean nothing" in " ".join(printed.split())
    assert all(case.title in printed for case in CASES.values())


def test_a_folder_has_the_numbers_the_page_and_the_plots_alone(smoke: tuple[Path, str]) -> None:
    names = {path.name for path in smoke[0].iterdir()}
    assert names == {"results.json", "report.html", *(f"{case}.png" for case in CASES)}
    assert all(path.stat().st_size > 1000 for path in smoke[0].iterdir())


def test_every_round_is_kept(smoke: tuple[Path, str]) -> None:
    rows = QuantizationResult.load(smoke[0]).cases["latency"].rows
    assert {len(row.values) for row in rows} == {settings.SMOKE_ROUNDS}
    assert {row.setting for row in rows} == {f"{step}, batch {b}" for step in ("prefill", "decode") for b in (1, 2)}
    assert {latency.DENSE, latency.NF4, latency.STOCK, latency.LORA} <= {row.arm for row in rows}


def test_a_result_survives_its_file_and_its_dict(smoke: tuple[Path, str], tmp_path: Path) -> None:
    found = QuantizationResult.load(smoke[0] / "results.json")
    assert QuantizationResult.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    found.keep(tmp_path)
    assert (tmp_path / "results.json").read_bytes() == (smoke[0] / "results.json").read_bytes()


def test_report_prints_the_same_tables(smoke: tuple[Path, str]) -> None:
    again = run("--report", "--output", str(smoke[0]))
    assert again.exit_code == 0
    assert again.output.strip() in smoke[1]


class Page(HTMLParser):
    """What tags a page opens and leaves open, and what it would fetch."""

    VOID = ("meta", "br", "img", "link", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "srcset") and not (value or "").startswith("#"):
                self.fetched.append(f"{tag} {name}={value}")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(smoke: tuple[Path, str]) -> None:
    text = (smoke[0] / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.fetched == []
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "script" not in page.tags
    assert page.tags.count("section") == len(CASES)
    assert page.tags.count("svg") == len(CASES)
    assert len(page.ids) == len(set(page.ids))  # plots do not borrow each other's shapes
    assert "prefers-color-scheme: dark" in text


def test_names_from_strangers_are_no_markup_in_the_page(smoke: tuple[Path, str]) -> None:
    found = QuantizationResult.load(smoke[0])
    found.model["name"] = "<script>alert(1)</script>"
    assert "<script>" not in html(found)


def test_what_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = QuantizationBenchmark(cases=QUICK[:1], smoke=True, output=tmp_path).run()
    kept = first.cases[QUICK[0]]
    both = QuantizationBenchmark(cases=QUICK, smoke=True, output=tmp_path).run()
    assert set(both.cases) == set(QUICK)
    assert both.cases[QUICK[0]] == kept  # to the last digit of its timings
    assert QuantizationResult.load(tmp_path) == both
    monkeypatch.setattr("hf_qlora.bench.measure.code", lambda: "another")
    again = QuantizationBenchmark(cases=QUICK[:1], smoke=True, output=tmp_path).run()
    assert again.cases[QUICK[0]] != kept  # by other code
    assert again.cases[QUICK[1]] == both.cases[QUICK[1]]


def test_an_interruption_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(CASES, "double-quant", replace(CASES["double-quant"], run=interrupt))
    stopped = run(*QUICK, "--smoke", "--output", str(tmp_path))
    assert stopped.exit_code == 130
    assert "the same command goes on" in stopped.output
    assert list(QuantizationResult.load(tmp_path).cases) == ["precision"]
    monkeypatch.undo()
    assert run(*QUICK, "--smoke", "--output", str(tmp_path)).exit_code == 0
    assert list(QuantizationResult.load(tmp_path).cases) == ["precision", "double-quant"]


def test_results_of_other_settings_are_left_alone(smoke: tuple[Path, str]) -> None:
    before = (smoke[0] / "results.json").read_bytes()
    done = run("--smoke", "--seed", "1", "--output", str(smoke[0]))
    assert done.exit_code == 2
    assert "seed=0, not 1" in done.output
    assert (smoke[0] / "results.json").read_bytes() == before


def test_results_changed_by_hand_are_found(smoke: tuple[Path, str], tmp_path: Path) -> None:
    text = (smoke[0] / "results.json").read_text()
    (tmp_path / "results.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    for arguments in (["--report"], ["--smoke"]):
        done = run(*arguments, "--output", str(tmp_path))
        assert done.exit_code == 2
        assert "was changed after it was measured" in " ".join(done.output.split())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models: a Llama, the same in NF4, and a classifier."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llama().save_pretrained(folder / "llama")
    hf_qlora.quantize_model(llama()).save_pretrained(folder / "packed")
    bert().save_pretrained(folder / "bert")
    (folder / "empty.jsonl").write_text('{"text": " "}\n')
    (folder / "prose.txt").write_text("It was the best of times, it was the worst of times.")
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["speed"], "['speed'] is no case of the suite; choose from ['memory', 'latency', 'precision', "),
        (["--model", "nowhere/at-all"], "nowhere/at-all"),
        (["--model", "{models}/packed"], "is quantized already; name the dense model"),
        (["--model", "{models}/bert"], "no causal language model"),
        (["--model", "{models}/llama", "--texts", "{models}/none.txt"], "none.txt is not there"),
        (["--model", "{models}/llama", "--texts", "{models}/empty.jsonl"], "has no texts"),
        (["--model", "{models}/llama", "--texts", "{models}/prose.txt"], "no tokenizer beside LlamaForCausalLM"),
        (["--device", "cuda"], "there is no CUDA; choose cpu"),
        (["--device", "abacus"], "device='abacus' is not known"),
        (["--dtype", "int3"], "dtype='int3' is not known"),
        (["--report"], "is not there; measure first"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    models: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    given = [argument.format(models=models) for argument in arguments]
    done = run(*given, "--output", str(tmp_path / "out"))
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())
    assert done.output.startswith("Error: ")
    assert not (tmp_path / "out").exists()


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(QuantizationBenchmark, "_do", None)
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        done = run("load", "--smoke", "--output", str(target))
        assert done.exit_code == 2
        assert "cannot be written into" in done.output
    check_folder(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_model_of_few_positions_is_trained_on_short_rows(tmp_path: Path) -> None:
    gpt2(n_positions=32, vocab_size=256).save_pretrained(tmp_path)
    assert train_step.positions(str(tmp_path)) == 32
    assert train_step.size_of(str(tmp_path), smoke=False) == (2, 32, 16)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(settings, "load_model", never)
    free = type("Free", (), {"available": 2**20})
    monkeypatch.setattr(settings.psutil, "virtual_memory", lambda: free)
    done = run("memory", "--model", str(models / "llama"), "--output", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert "memory on llama takes about 0.0 GiB on cpu, and 0.0 GiB are free" in " ".join(done.output.split())


def test_a_classifier_has_the_cases_that_it_can(models: Path) -> None:
    found = QuantizationBenchmark(str(models / "bert"), ["memory", "double-quant"], smoke=True).run()
    assert set(found.cases) == {"memory", "double-quant"}
    assert found.model["class"] == "BertForSequenceClassification"


def fingerprint(folder: Path) -> str:
    found: str = settings.described(folder, settings.Settings(smoke=True))[2]["files"]
    return found


def test_a_model_that_was_trained_on_is_another(tmp_path: Path) -> None:
    """In the same folder, with the same config and files of the same sizes."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path)
    before = fingerprint(tmp_path)
    model.save_pretrained(tmp_path)
    assert fingerprint(tmp_path) == before
    size = (tmp_path / "model.safetensors").stat().st_size
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == size
    assert fingerprint(tmp_path) != before


def test_other_texts_of_the_same_name_are_others(tmp_path: Path) -> None:
    file = tmp_path / "prose.txt"
    file.write_text("It was the best of times.")
    given = settings.Settings(smoke=True, texts=str(file))
    before = given.named()["texts"]
    assert str(tmp_path) not in before
    (tmp_path / "else").mkdir()
    file.rename(tmp_path / "else" / "same.txt")
    assert settings.Settings(smoke=True, texts=str(tmp_path / "else" / "same.txt")).named()["texts"] == before
    file.write_text("It was the worst of times")
    assert given.named()["texts"] != before


@pytest.mark.parametrize("error", [ValueError("shapes differ"), OSError("gone"), ImportError("no such")])
def test_an_error_within_a_case_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setitem(CASES, "double-quant", replace(CASES["double-quant"], run=fail))
    done = run(*QUICK, "--smoke", "--output", str(tmp_path))
    assert done.exit_code == 1
    assert isinstance(done.exception, CaseError)
    assert done.exception.__cause__ is error
    assert f"double-quant failed: {error}" in str(done.exception)
    assert list(QuantizationResult.load(tmp_path).cases) == ["precision"]


def test_a_gpu_without_memory_is_one_sentence_and_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setitem(CASES, "double-quant", replace(CASES["double-quant"], run=fail))
    done = run(*QUICK, "--smoke", "--output", str(tmp_path))
    assert done.exit_code == 2
    assert "Error: double-quant ran out of memory on cpu; free some of it, choose a smaller model" in done.output
    assert list(QuantizationResult.load(tmp_path).cases) == ["precision"]


@pytest.mark.slow
def test_processes_of_their_own_measure_the_same_weights(models: Path) -> None:
    context = settings.Context(settings.Settings(smoke=False), models / "llama", models)
    found = context.alone(memory.measure, "NF4, quantized in place", models / "llama", context.settings)
    here = memory.measure("NF4, quantized in place", models / "llama", context.settings)
    weights = [name for name in here if name.endswith("_bytes") and name.split("_")[0] not in ("resident", "peak")]
    assert {name: found[name] for name in weights} == {name: here[name] for name in weights}
    assert found["peak_bytes"] > found["resident_bytes"] > 0


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_summaries_are_numpys(count: int) -> None:
    values = np.random.default_rng(count).gamma(2.0, size=count)
    found = summary(values.tolist())
    ordered = sorted(values)
    place = 0.95 * (count - 1)  # linear between the neighbours, as numpy's default is
    below, share = int(place), place - int(place)
    p95 = ordered[below] + share * (ordered[min(below + 1, count - 1)] - ordered[below])
    spread = np.sqrt(((values - values.mean()) ** 2).sum() / (count - 1)) if count > 1 else 0.0
    expected = {
        "mean": values.sum() / count,
        "std": spread,
        "median": np.median(values),
        "p95": p95,
        "min": ordered[0],
    }
    assert found == pytest.approx(expected, rel=1e-12)  # float64 sums of a few numbers


def test_the_python_face_is_exported_and_made_where_it_is_used() -> None:
    assert "QuantizationBenchmark" in hf_qlora.__all__
    assert hf_qlora.QuantizationBenchmark is QuantizationBenchmark
    assert "QuantizationBenchmark" not in vars(hf_qlora)  # an import of the package's own would put it there
    with pytest.raises(AttributeError, match="no attribute 'Benchmark'"):
        _ = hf_qlora.Benchmark


def test_rows_are_read_back_as_they_were() -> None:
    row = Row("NF4", "seconds", (0.1, 0.2), "decode, batch 1", 8)
    assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row
