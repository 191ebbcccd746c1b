"""`hf-qlora quantize` writes what `quantize_model` makes, for stock transformers to read; or nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from architectures import VOCAB, bert, gpt2, llama, tokens
from byte_tokenizer import byte_tokenizer
from merging import differences, logits, relative
from peft import AutoPeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from hf_qlora import (
    NF4Config,
    QLoRAConfig,
    calibration_report,
    calibration_rows,
    cli,
    quantize_files,
    quantize_model,
)
from hf_qlora.config.fingerprint import Fingerprint
from hf_qlora.console import INTERRUPTED
from hf_qlora.kernels.emulated import is_emulated
from hf_qlora.merge import sources
from hf_qlora.quant.calibrate import group, rounder, run
from hf_qlora.quant.calibrate.kept import beside
from hf_qlora.quant.calibrate.report import CLEAR_GAP, CLEAR_LOSS, CalibrationReport, LayerCalibration
from hf_qlora.quant.fingerprint import take_fingerprint


# Stock transformers and bitsandbytes, in a process where this package cannot be imported.
STOCK = """
import sys
from pathlib import Path

sys.modules["hf_qlora"] = None
import torch, transformers
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
for place in map(Path, sys.argv[1:]):
    kind = getattr(transformers, (place / "kind").read_text())
    model = kind.from_pretrained(place / "nf4", dtype="auto").eval()
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert all(type(layer).__module__ == "bitsandbytes.nn.modules" for layer in layers)
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False  # repacking for such processors rounds the scales
    with torch.no_grad():
        logits = model(input_ids=load_file(place / "ids.safetensors")["ids"]).logits
    save_file({"logits": logits.float()}, place / "logits.safetensors")
    print(place.name, len(layers), model.dtype)
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The offset of nested scales depends on the number of threads; and tiny models are slower on two."""
    torch.set_num_threads(1)


def invoke(*arguments: str | Path) -> Result:
    settings = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(cli.app, ["quantize", *map(str, arguments)], env=settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dense model with a tokenizer, a generation config and a card."""
    base = tmp_path / "base"
    model: Any = llama().to(torch.bfloat16)
    model.save_pretrained(base)
    settings = json.loads((base / "generation_config.json").read_text())
    settings["temperature"] = 0.5  # without do_sample, as some models have it: transformers saves it only as it was
    (base / "generation_config.json").write_text(json.dumps(settings))
    byte_tokenizer(chat=True).save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base\n")
    return base


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out" / "nf4"


def test_without_calibration_it_is_what_quantize_model_makes(folder: Path, target: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = invoke(folder, "--output", target, "--device", "cpu")
    assert result.exit_code == 0, result.output
    expected = quantize_model(AutoModelForCausalLM.from_pretrained(folder))
    found = AutoModelForCausalLM.from_pretrained(target)
    assert not differences(found, expected)
    assert len([key for key in found.state_dict() if "quant_state" in key]) == 14
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert found.generation_config.temperature == 0.5
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer("a b").input_ids == byte_tokenizer()("a b").input_ids
    assert tokenizer.chat_template == byte_tokenizer(chat=True).chat_template
    assert [path.name for path in target.parent.iterdir()] == ["nf4"]
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()} == {0o666 & ~mask}


CASES: dict[str, tuple[Callable[[], nn.Module], str, torch.dtype, NF4Config]] = {
    "float32": (llama, "AutoModelForCausalLM", torch.float32, NF4Config()),
    "bfloat16": (llama, "AutoModelForCausalLM", torch.bfloat16, NF4Config()),
    "wide": (llama, "AutoModelForCausalLM", torch.bfloat16, NF4Config(compute_dtype="float32")),
    "settings": (llama, "AutoModelForCausalLM", torch.float32, NF4Config(double_quant=False, block_size=128)),
    "skipped": (llama, "AutoModelForCausalLM", torch.float32, NF4Config(skip_modules=("down_proj",))),
    "gpt2": (gpt2, "AutoModelForCausalLM", torch.float32, NF4Config()),
    "bert": (bert, "AutoModelForSequenceClassification", torch.float32, NF4Config()),
}


@pytest.fixture(scope="module")
def read_by_stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], list[str]]:
    """All cases, written here and read in one process without this package; what we computed, and what it printed."""
    threads, place = torch.get_num_threads(), tmp_path_factory.mktemp("stock")
    torch.set_num_threads(1)
    ours = {}
    for name, (make, kind, dtype, settings) in CASES.items():
        torch.manual_seed(0)
        model: Any = make().to(dtype)
        model.save_pretrained(place / name / "base")
        quantize_files.quantize_files(str(place / name / "base"), place / name / "nf4", settings, device="cpu")
        (place / name / "kind").write_text(kind)
        ids = tokens()
        save_file({"ids": ids}, place / name / "ids.safetensors")
        # Loaded: `to` casts rotary frequencies too, which loading leaves in float32.
        again = getattr(transformers, kind).from_pretrained(place / name / "base", dtype="auto")
        ours[name] = logits(quantize_model(again, settings).eval(), ids)
    command = [sys.executable, "-c", STOCK, *(str(place / name) for name in CASES)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    torch.set_num_threads(threads)
    assert child.returncode == 0, child.stderr
    return place, ours, child.stdout.splitlines()


@pytest.mark.parametrize(
    ("name", "packed"),
    [("float32", 14), ("bfloat16", 14), ("wide", 14), ("settings", 14), ("skipped", 12), ("gpt2", 8), ("bert", 13)],
)
def test_stock_transformers_computes_the_same_logits(
    name: str, packed: int, read_by_stock: tuple[Path, dict[str, Tensor], list[str]]
) -> None:
    place, ours, printed = read_by_stock
    dtype = CASES[name][2]
    assert f"{name} {packed} {dtype}" in printed
    # The same codes and products in the same dtype: bitsandbytes may add in another order than we do. Where the
    # processor has loops for bfloat16, ours are summed in float32 and rounded once.
    tolerance = 2**-7 if name == "bfloat16" else 2e-6
    assert relative(load_file(place / name / "logits.safetensors")["logits"], ours[name]) <= tolerance


def test_an_adapter_trained_on_it_refers_to_it(
    folder: Path, target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantize_files.quantize_files(str(folder), target, device="cpu")
    base = AutoModelForCausalLM.from_pretrained(target)
    config = QLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(target)
    record = json.loads((target / "hf_qlora_quantization.json").read_text())
    assert saved["hf_qlora"]["fingerprint"] == record["fingerprint"]
    ids = tokens()
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype="auto")
    with torch.no_grad():
        found, expected = (one.eval()(input_ids=ids, output_hidden_states=True) for one in (again, model))
    assert found.hidden_states[-1].equal(expected.hidden_states[-1])
    # The head of a model that trains multiplies in float32 where the processor does not in bfloat16; one that is
    # loaded for inference has torch's: two sums of the same products, each rounded to bfloat16 once.
    tolerance = 2**-8 if is_emulated(found.logits) else 0
    assert relative(found.logits.float(), expected.logits.float()) <= tolerance
    assert "was trained on another base" not in caplog.text


def test_what_is_written_beside_it_says_what_it_is(folder: Path, target: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "report.json"
    result = invoke(folder, "--output", target, "--device", "cpu", "--report", file)
    assert result.exit_code == 0, result.output
    written = json.loads((target / "hf_qlora_quantization.json").read_text())
    assert json.loads(file.read_text()) == written
    assert Fingerprint.from_dict(written["fingerprint"]) == take_fingerprint(
        AutoModelForCausalLM.from_pretrained(target)
    )
    assert written["quantization"] == NF4Config(compute_dtype="bfloat16").to_dict()
    assert (written["calibration"], written["report"]) == (None, None)
    assert written["base"] == {"id": None, "commit": None, "class": "LlamaForCausalLM", "dtype": "bfloat16"}
    assert f"quantized  {folder}, rounded to the nearest level\n" in result.output
    assert f"saved      in {target}\n" in result.output
    assert written["fingerprint"]["root"][:16] in result.output


def test_the_dtype_of_products_may_be_another(folder: Path, target: Path) -> None:
    """As in what transformers makes by default: bfloat16 weights, products in float32."""
    options = ("--device", "cpu", "--no-double-quant", "--compute-dtype", "float32")
    assert invoke(folder, "--output", target, *options).exit_code == 0
    stored = json.loads((target / "config.json").read_text())
    assert (stored["dtype"], stored["quantization_config"]["bnb_4bit_compute_dtype"]) == ("bfloat16", "float32")
    assert "scales in float32; products in `float32`" in (target / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(target).model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    result = invoke(folder, "--output", target, *options[:-1], "int8", "--overwrite")
    assert result.exit_code == 2
    assert "compute_dtype='int8' is not supported; choose one of" in result.output


def test_the_card_says_what_it_is_and_not_where_it_was_made(folder: Path, target: Path, tmp_path: Path) -> None:
    options = ("--block-size", "128", "--no-double-quant", "--skip-modules", "down_proj")
    assert invoke(folder, "--output", target, "--device", "cpu", *options).exit_code == 0
    text = (target / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "apache-2.0"
    assert metadata["pipeline_tag"] == "text-generation"
    assert {"bitsandbytes", "4-bit", "nf4", "hf_qlora"} <= set(metadata["tags"])
    assert (
        "| Quantized | NF4 in blocks of 128, scales in float32; products in `bfloat16`; dense by name: `down_proj`"
        in text
    )
    assert "| Rounded | `to the nearest level` |" in text
    assert "quantization=NF4Config(double_quant=False, block_size=128)" in text
    assert "`apache-2.0`, as the base" in text
    for path in target.glob("*.json"):
        assert str(tmp_path) not in path.read_text()
    assert str(tmp_path) not in text


def test_a_base_from_the_hub_is_named(folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = folder.parent / "models--alice--base" / "snapshots" / ("0" * 40)
    cached.parent.mkdir(parents=True)
    folder.rename(cached)
    monkeypatch.setattr(sources, "snapshot_download", lambda name, **options: str(cached))
    assert invoke("alice/base", "--output", target, "--device", "cpu").exit_code == 0
    text = (target / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("alice/base", "quantized")
    assert metadata["license"] == "apache-2.0"
    assert "[`alice/base`](https://huggingface.co/alice/base) in 4 bits" in text
    written = json.loads((target / "hf_qlora_quantization.json").read_text())
    assert (written["base"]["id"], written["base"]["commit"]) == ("alice/base", "0" * 40)


def test_what_a_user_wrote_into_the_card_stays(folder: Path, target: Path) -> None:
    assert invoke(folder, "--output", target, "--device", "cpu").exit_code == 0
    card = target / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: mit") + "\n## Mine\n\nAbout it.\n")
    again = invoke(folder, "--output", target, "--device", "cpu", "--overwrite", "--block-size", "256")
    assert again.exit_code == 0, again.output
    text = card.read_text()
    assert "## Mine\n\nAbout it.\n" in text
    assert "license: mit" in text
    assert text.count("| Quantized |") == 1
    assert "NF4 in blocks of 256" in text
    (target / "notes.txt").write_text("mine")
    refused = invoke(folder, "--output", target, "--overwrite")
    assert (refused.exit_code, "holds other things than one saved model (notes.txt)" in refused.output) == (2, True)


CALIBRATED = ("--rows", "6", "--length", "32", "--held-out", "2", "--seed", "3", "--device", "cpu")


@pytest.fixture
def speeches(tmp_path: Path) -> Path:
    file = tmp_path / "speeches.txt"
    file.write_text(" ".join(f"Word {number}." for number in range(2000)))
    return file


def test_calibrated_it_is_what_quantize_model_makes_of_the_same_rows(
    folder: Path, target: Path, speeches: Path
) -> None:
    result = invoke(folder, "--output", target, "--calibrate", speeches, *CALIBRATED)
    assert result.exit_code == 0, result.output
    expected: Any = AutoModelForCausalLM.from_pretrained(folder)
    rows = calibration_rows(str(speeches), expected, rows=6, length=32, held_out=2, seed=3)
    quantize_model(expected, calibration=rows)
    assert not differences(AutoModelForCausalLM.from_pretrained(target), expected)
    report = calibration_report(expected)
    assert report is not None
    source = "6 rows of 32 tokens from speeches.txt, and 2 held out"
    assert f"rounded calibrated on {source}" in result.output
    assert f"calibrated {report.losses['calibrated']:.4f} nats a token" in result.output
    card = (target / "README.md").read_text()
    assert f"| Rounded | `calibrated on {source}` |" in card
    assert f"nearest {report.losses['nearest']:.4f}" in card
    written = json.loads((target / "hf_qlora_quantization.json").read_text())
    assert written["calibration"] == {"source": source, "fingerprint": rows.fingerprint}
    assert written["report"]["losses"] == report.losses
    assert [path.name for path in target.parent.iterdir()] == ["nf4"]


def test_what_is_worse_than_nearest_is_refused_and_forced_with_a_note_in_its_card(
    folder: Path, target: Path, speeches: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is one document, of which the held-out rows are the end: that is in the card too."""
    monkeypatch.setattr(run, "_nearest_loss", lambda *_: 1.0)
    arguments = (folder, "--output", target, "--calibrate", speeches, *CALIBRATED)
    report_file = target.parent.parent / "refused.json"
    refused = invoke(*arguments, "--report", report_file)
    assert refused.exit_code == 2
    assert json.loads(report_file.read_text())["losses"]["nearest"] == 1.0
    assert "nats a token, and rounded to nearest 1.0000. Give other rows" in refused.output
    assert "note       Rounding to nearest loses less on held-out rows" in refused.output
    assert not target.exists()
    assert "Rounding to nearest loses less" in caplog.text
    forced = invoke(*arguments, "--force")
    assert forced.exit_code == 0, forced.output
    rows = [line for line in (target / "README.md").read_text().splitlines() if line.startswith("| Note ")]
    report = json.loads((target / "hf_qlora_quantization.json").read_text())["report"]
    assert [row.partition("`")[2].partition("`")[0] for row in rows] == report["notes"]
    assert any("are the end of the longest document" in note for note in report["notes"])
    assert any("Rounding to nearest loses less" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("calibrated", "error", "worse"),
    [
        (2.0, 0.2, False),
        (2.0 + CLEAR_GAP / 2, 0.2, False),
        (2.0 + CLEAR_LOSS / 2, 0.05, False),
        (2.0 + CLEAR_LOSS / 2, 0.2, True),
        (2.0 + 2 * CLEAR_LOSS, 0.05, True),
        (float("nan"), 0.05, True),
        (None, 0.2, False),
    ],
    ids=["as good", "hardly worse", "by loss alone", "by both", "clearly", "nan", "no loss"],
)
def test_worse_is_worse_than_nearest_clearly_or_by_outputs_too(
    calibrated: float | None, error: float, worse: bool
) -> None:
    losses = {} if calibrated is None else {"dense": 1.9, "nearest": 2.0, "calibrated": calibrated}
    layers = [LayerCalibration("a", error, 0.1, None, 0.5)]
    assert CalibrationReport("", 0, 8, 2, "", {}, layers, losses).is_worse == worse


def test_ids_that_may_be_another_tokenizers_are_calibrated_on_by_force(
    folder: Path, target: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": 40 * tensors["lm_head.weight"]}, folder / "model.safetensors", {"format": "pt"}
    )
    rows = [{"input_ids": torch.randint(1, VOCAB, (300,)).tolist()} for _ in range(4)]
    (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = (folder, "--output", target, "--device", "cpu", "--calibrate", tmp_path / "ids.jsonl", *CALIBRATED)
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert "the ids are probably another tokenizer's" in refused.output
    forced = invoke(*arguments, "--force")
    assert forced.exit_code == 0, forced.output


def test_a_calibration_that_was_stopped_goes_on(
    folder: Path,
    target: Path,
    speeches: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = (folder, "--output", target, "--calibrate", speeches, *CALIBRATED)
    real, calls = group.round_group, []

    def stopping(*given: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr(rounder, "round_group", stopping)
    stopped = invoke(*arguments)
    assert stopped.exit_code == INTERRUPTED
    assert "the same call goes on there" in caplog.text
    assert not target.exists()
    went_on = invoke(*arguments)
    assert went_on.exit_code == 0, went_on.output
    assert len(calls) == 4 + 8 - 3  # two layers of four groups, of which three had been rounded
    assert [path.name for path in target.parent.iterdir()] == ["nf4"]
    monkeypatch.setattr(rounder, "round_group", real)
    straight = target.with_name("straight")
    invoke(folder, "--output", straight, "--calibrate", speeches, *CALIBRATED)
    one, other = (load_file(place / "model.safetensors") for place in (target, straight))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_rounding_to_nearest_leaves_what_a_stopped_calibration_kept(folder: Path, target: Path) -> None:
    kept = beside(target)
    kept.mkdir(parents=True)
    (kept / "layers").write_text("of hours")
    result = invoke(folder, "--output", target)
    assert result.exit_code == 0, result.output
    assert (kept / "layers").read_text() == "of hours"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "100"], "block_size=100 is not supported"),
        (["--dtype", "int8"], "--dtype int8 is not known"),
        (["--device", "abacus"], "device='abacus' is not known; choose cpu, cuda"),
        (["--calibrate", "./nowhere.txt"], "The file ./nowhere.txt is not there."),
        (["--calibrate", "{base}/config.txt.gz"], "The file {base}/config.txt.gz is not there."),
        (
            ["--calibrate", "{base}/model.safetensors"],
            "{base}/model.safetensors is not read; name a file that ends in",
        ),
        (["--report", "{base}"], "{base} is a folder; name a file."),
        (["--output", "{base}"], "{base} is not empty"),
        (["--output", "{base}", "--overwrite"], "{base} is what is quantized; name another folder"),
        (["--output", "{base}/config.json"], "{base}/config.json is a file"),
    ],
)
def test_a_bad_option_is_one_sentence(folder: Path, target: Path, arguments: list[str], message: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "README.md").unlink()  # a folder to overwrite otherwise
    given = [argument.replace("{base}", str(folder)) for argument in arguments]
    result = invoke(folder, "--output", target, *given)
    assert result.exit_code == 2, result.output
    assert f"Error: {message.replace('{base}', str(folder))}" in result.output
    assert not target.exists()
    (folder / "README.md").write_bytes(before["README.md"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("absent", "is not there"),
        ("offline", "'nobody/nothing' is no folder and not in the Hub's cache"),
        ("quantized", "is quantized already; name the dense model that it was made from"),
        ("no class", "names no class of transformers"),
        ("lacking", "lacks 1 of its weights: model.layers.0.mlp.up_proj.weight"),
        ("nan", "model.layers.0.mlp.up_proj.weight has NaN or infinite values"),
    ],
)
def test_a_model_that_cannot_be_quantized_is_one_sentence(
    folder: Path, target: Path, problem: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name, weights = "model.layers.0.mlp.up_proj.weight", folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(weights).items()}
    given: str | Path = folder
    if problem == "absent":
        given = folder / "elsewhere"
    elif problem == "offline":
        given = "nobody/nothing"
    elif problem == "quantized":
        quantize_model(AutoModelForCausalLM.from_pretrained(folder)).save_pretrained(folder)
    elif problem == "no class":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["os.system"]}))
    elif problem == "lacking":
        save_file({key: value for key, value in tensors.items() if key != name}, weights, {"format": "pt"})
    else:
        tensors[name][0, 0] = torch.nan
        save_file(tensors, weights, {"format": "pt"})
    result = invoke(given, "--output", target, "--device", "cpu")
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert message in line
    assert not target.exists()


@pytest.mark.parametrize("calibrate", [False, True], ids=["nearest", "calibrated"])
def test_a_full_disk_leaves_what_was_there(
    calibrate: bool, folder: Path, target: Path, speeches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one, as the kernel reports it: no file may grow beyond a limit. What was calibrated is kept, too."""
    resource = pytest.importorskip("resource")
    done: list[int] = []
    round_group = rounder.round_group
    monkeypatch.setattr(rounder, "round_group", lambda *args, **kw: done.append(1) or round_group(*args, **kw))
    assert invoke(folder, "--output", target, "--device", "cpu").exit_code == 0
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    again = (folder, "--output", target, "--overwrite", "--block-size", "128")
    again += ("--calibrate", speeches, *CALIBRATED) if calibrate else ("--device", "cpu")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        result = invoke(*again)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert result.exit_code == 2
    assert re.search(
        rf"Error: Saving the model in {re.escape(str(target))} failed: .*What was there is unch", result.output
    )
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    kept, groups = beside(target), len(done)
    assert {path.name for path in target.parent.iterdir()} == {"nf4"} | ({kept.name} if calibrate else set())
    assert bool(groups) == calibrate
    assert invoke(*again).exit_code == 0
    assert len(done) == groups
    assert [path.name for path in target.parent.iterdir()] == ["nf4"]


def test_an_interruption_leaves_nothing_behind(folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_files, "write_quantized_card", interrupted)
    result = invoke(folder, "--output", target, "--device", "cpu")
    assert (result.exit_code, result.output.splitlines()[-1]) == (INTERRUPTED, f"Stopped; {target} is not there.")
    assert not list(target.parent.iterdir())


def test_a_report_in_the_models_folder_is_refused(folder: Path, target: Path) -> None:
    """It would not be overwritten from then on."""
    result = invoke(folder, "--output", target, "--report", target / "report.json")
    assert result.exit_code == 2
    assert "is in the model's folder" in result.output
    assert not target.exists()


def test_every_option_has_its_help() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    options = set(re.findall(r"--[a-z][a-z-]+", result.output))
    assert {"--output", "--calibrate", "--rows", "--length", "--held-out", "--seed", "--skip-modules"} <= options
    for option in options - {"--help"}:
        assert re.search(rf"{option}\b.* [a-zA-Z]", result.output), option


def test_other_vocabularies_are_refused_before_the_weights_are_read(
    folder: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"input_ids": [VOCAB] * 600}) for _ in range(2)))
    monkeypatch.setattr(quantize_files, "load_model", lambda *arguments: pytest.fail("loaded"))
    options = ("--length", "32", "--calibrate", tmp_path / "rows.jsonl")
    result = invoke(folder, "--output", target, "--device", "cpu", *options)
    assert result.exit_code == 2
    assert f"input_ids has ids from 0 to {VOCAB}" in result.output or f"to {VOCAB}, and Llama" in result.output
