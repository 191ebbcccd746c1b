"""Each example runs offline from start to end, a few steps of it."""

from __future__ import annotations

import os
import re
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
