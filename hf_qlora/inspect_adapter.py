"""What a saved adapter holds, layer by layer, read from its files alone: `hf-qlora inspect`.

The tensors of a file are folded: α/r · ‖B A‖ is the size of ΔW with every scale in it. What the scales were is in the
JSON.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from rich.console import Console
from rich.table import Table

from hf_qlora import files, plots
from hf_qlora.config import AdaptiveDepthLoRAConfig, QLoRAConfig
from hf_qlora.layers.fold import rank_and_scaling
from hf_qlora.layers.norms import product_norm


_SHOWN = re.compile(r"\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)$")
_NUMBERED = re.compile(r"(.*?\.\d+)\.(.+)")
UNCUT = 200  # columns where no terminal says how many: a file keeps its numbers
SHORT = {"gain": "g", "attention": "a", "concentration": "c"}  # columns, as `layers/depth.py` calls them
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Module:
    """One adapted module.

    Attributes:
        delta: ‖ΔW‖, Frobenius.
        fold: what is multiplied into `lora_B` beside the stock scaling; f · g · a, times √r with rsLoRA.
        gain, attention, concentration: None where the adapter has none.
    """

    layer: str
    name: str
    rank: int
    delta: float
    fold: float
    gain: float | None = None
    attention: float | None = None
    concentration: float | None = None


def read_modules(adapter: str) -> tuple[LoraConfig, list[Module], list[str]]:
    """The config, the modules and the names of other tensors of an adapter at a local path or Hub id.

    Raises:
        AdapterFileError: not an adapter of ours, or not whole.
    """
    folder = files.adapter_folder(adapter)
    if folder is None:
        what = "there is no such folder, nor is it on the Hub or in its cache"
        if Path(adapter).exists():
            what = "it has no adapter_config.json of ours" if Path(adapter).is_dir() else "it is a file, and no folder"
        raise files.AdapterFileError(f"{adapter} is no adapter saved by hf_qlora: {what}.")
    folder.check()
    config = PeftConfig.from_pretrained(str(folder.weights.parent))
    assert isinstance(config, QLoRAConfig)
    tensors = files.read_tensors(folder.weights)
    learned, by = folder.record.get("depth", {}), folder.record.get("fold")
    by = {name: c for name, c in by.items() if isinstance(c, float)} if isinstance(by, dict) else {}
    modules = []
    for key in sorted(tensors, key=_natural):
        module = key.removesuffix(".lora_A.weight")
        if module != key:
            if f"{module}.lora_B.weight" not in tensors:
                raise files.AdapterFileError(f"{folder.weights} has {key}, but no lora_B for it; it is incomplete.")
            A, B = tensors[key].flatten(1), tensors[f"{module}.lora_B.weight"].flatten(1)
            modules.append(_module(config, module, int(A.shape[0]), product_norm(B, A), by, learned))
    others = {key for key in tensors if not _SHOWN.search(key)}
    return config, modules, sorted(others, key=_natural)


def _module(
    config: QLoRAConfig, module: str, rank: int, norm: float, by: dict[str, float], learned: dict[str, Any]
) -> Module:
    plain = module.removeprefix(_PREFIX)
    numbered = _NUMBERED.match(plain)
    layer, name = (numbered[1], numbered[2]) if numbered else ("", plain)
    stock = config.portable_form() if config.folds else config
    values = learned.get(module, {})
    gain = None
    if isinstance(config, AdaptiveDepthLoRAConfig) and "theta" in values:
        gain = math.exp(config.gain_bound * math.tanh(values["theta"] / config.gain_bound))
    concentration = values.get("concentration")
    return Module(
        *(layer, name, rank, rank_and_scaling(stock, plain)[1] * norm, by.get(module, 1.0)),
        *(gain, None if concentration is None else values.get("attention"), concentration),
    )


def show(adapter: str, plot: Path | None = None, console: Console | None = None) -> None:
    """Print the table, and draw the map of ‖ΔW‖ over layers and modules, relative to its geometric mean."""
    if plot is not None:
        plots.pyplot()  # an ImportError before any work
        plots.check_path(plot)
    config, modules, others = read_modules(adapter)
    to = console or Console(width=None if sys.stdout.isatty() else UNCUT)
    rank = f"r={config.r}" + (" and patterns" if config.rank_pattern else "")
    to.print(f"{adapter}: {type(config).__name__}, {rank}, lora_alpha={config.lora_alpha}", highlight=False)
    prefix = _common_prefix(modules)
    if prefix:
        to.print(f"layers of {prefix.removesuffix('.')}", highlight=False)
    to.print(_table(modules))
    if config.use_dora:
        to.print("‖ΔW‖ is that of B A; DoRA's magnitudes change rows besides.", highlight=False)
    if others:
        to.print(f"{len(others)} other tensors are not shown: {others[0]}, …", highlight=False)
    if plot is not None:
        sizes = [math.log(module.delta) for module in modules if module.delta > 0]
        mean = math.exp(sum(sizes) / len(sizes)) if sizes else 1.0
        grid = {(module.layer, module.name): module.delta / mean for module in modules}
        plots.heat_maps({Path(adapter).name: grid}, plot, "‖ΔW‖ / geometric mean")
        to.print(f"Drawn in {plot}", highlight=False)


def _table(modules: list[Module]) -> Table:
    prefix = _common_prefix(modules)
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "module"):
        table.add_column(column, no_wrap=True)
    optional = [kind for kind in SHORT if any(getattr(module, kind) is not None for module in modules)]
    for column in ("rank", "‖ΔW‖", "fold", *(SHORT[kind] for kind in optional)):
        table.add_column(column, justify="right", no_wrap=True)
    above = ""
    for module in modules:
        numbers = [module.delta, module.fold, *(getattr(module, kind) for kind in optional)]
        shown = ["" if number is None else f"{number:.4f}" for number in numbers]
        layer = "" if module.layer == above else module.layer.removeprefix(prefix)
        table.add_row(layer, module.name, str(module.rank), *shown)
        above = module.layer
    return table


def _common_prefix(modules: list[Module]) -> str:
    """ "model.layers." if all layers are in that stack: said once, not in every line."""
    stacks = {module.layer.rpartition(".")[0] for module in modules}
    return f"{stacks.pop()}." if len(stacks) == 1 else ""


def _natural(key: str) -> list[Any]:
    """layers.2 before layers.10."""
    return [int(part) if part.isdecimal() else part for part in key.split(".")]
