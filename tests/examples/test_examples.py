"""Each example runs offline from start to end, a few steps of it."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hub.server import served


EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path, *arguments: str, **variables: str) -> str:
    environment = {"OMP_NUM_THREADS": "2", **os.environ, "HF_HUB_OFFLINE": "1", **variables}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def refused(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that is said."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("adaptive_depth", ("--learning-rate", "nan"), "nan is not between 0 and 1"),
        ("adaptive_depth", ("--steps", "0"), "0 is less than 1"),
        ("adaptive_depth", ("--output", "file"), "file is or lies in a file"),
        ("adaptive_depth", ("--resume",), "no whole checkpoint"),
        ("adaptive_depth", ("--output", "foreign"), "a README.md of another origin"),
        ("merge_and_serve", ("--steps", "0"), "0 is less than 1"),
        ("merge_and_serve", ("--output", "file"), "is or lies in a file"),
        ("merge_and_serve", ("--repo", "a/b/c"), "--repo a/b/c is no name"),
        ("merge_and_serve", ("--resume",), "no whole checkpoint"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    name: str,
    arguments: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("foreign").mkdir()
    Path("foreign/README.md").write_text("mine", encoding="utf-8")
    assert said in refused(name, monkeypatch, capsys, *arguments)


@pytest.mark.parametrize(
    ("name", "below"), [("adaptive_depth", "adaptive-depth"), ("merge_and_serve", "merge-and-serve/adapter")]
)
def test_the_result_of_another_script_stays(
    name: str, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(below).mkdir(parents=True)
    Path(below, "adapter_model.safetensors").touch()
    assert "holds another result" in refused(name, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adaptive_depth", "merge_and_serve"])
def test_ctrl_c_leaves_a_checkpoint_that_the_run_goes_on_from(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--steps", "10"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "'loss'" in line:  # it trains
            break
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "--resume goes on from it" in said.splitlines()[-1]
    (checkpoint,) = tmp_path.rglob("checkpoint-*")
    step = checkpoint.name.rpartition("-")[2]
    output = run(f"{name}.py", tmp_path, "--steps", "10", "--resume")
    assert f"going on from step {step}\n" in output
    assert list(checkpoint.parent.glob("adapter_model.safetensors"))
    assert not list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.slow
def test_adaptive_depth_in_two_processes(tmp_path: Path) -> None:
    launch = ["accelerate.commands.launch", "--num_processes", "2", "--cpu", "--main_process_port", "0"]
    command = [sys.executable, "-m", *launch, str(EXAMPLES / "adaptive_depth.py"), "--steps", "5"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert len(re.findall(r"accuracy on 1000 test headlines: 0\.[4-9]", output)) == 1
    found = re.search(r"reloaded (\S+), merged (\S+)", output)
    assert found
    assert all(float(number.rstrip(",")) < 1e-4 for number in found.groups())


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--attention",)])
def test_adaptive_depth(arguments: tuple[str, ...], tmp_path: Path) -> None:
    output = run("adaptive_depth.py", tmp_path, "--steps", "5", *arguments)
    assert re.search(r"accuracy on 1000 test headlines: 0\.[4-9]", output)
    assert "bert.encoder.layer.5" in output
    assert bool(re.search(r"fold +g +a +c\n", output)) == bool(arguments)
    found = re.search(r"reloaded (\S+), merged (\S+)", output)
    assert found
    assert all(float(number.rstrip(",")) < 1e-4 for number in found.groups())
    assert (tmp_path / "adaptive-depth" / "depth_scales.png").is_file()


@pytest.mark.slow
def test_merge_and_serve(tmp_path: Path) -> None:
    """On an NF4 base (that of `interop/test_llama_cpp.py` is dense): unmerged, merged and served are one function."""
    output = run("merge_and_serve.py", tmp_path, "--steps", "4")
    found = re.findall(r"log-probabilities within (\S+) of (the unmerged|ours, over (\d+) tokens)", output)
    assert len(found) == 3
    # float32 on both sides, in another order; see tests/interop/test_llama_cpp.py
    assert all(float(difference) < 2e-3 for difference, _, _ in found)
    assert all(int(count) >= 5 for _, _, count in found[1:])
    answers = dict(re.findall(r"^(transformers|  merged|  base and adapter) +(.*)$", output, re.MULTILINE))
    assert answers["transformers"] == answers["  merged"] == answers["  base and adapter"]
    assert (tmp_path / "merge-and-serve" / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
def test_merge_and_serve_by_way_of_the_hub(tmp_path: Path) -> None:
    with served() as hub:
        client = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        login = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_alice_write"}
        options = ("--steps", "2", "--repo", "alice/served")
        output = run("merge_and_serve.py", tmp_path, *options, **client, **login)
    pushed = hub.tree("alice/served")
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= pushed.keys()
    assert any("/resolve/" in line and "adapter_model.safetensors" in line for line in hub.log)  # and pulled
    assert "hf_alice_write" not in output
    assert not any(b"hf_alice_write" in content for content in pushed.values())
    assert re.search(r"^  merged +\S", output, re.MULTILINE)
