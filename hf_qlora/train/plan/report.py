"""The tables and the picture of a memory plan."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from hf_qlora import plots


if TYPE_CHECKING:
    from hf_qlora.train.plan.memory_plan import MemoryPlan

UNCUT = 120  # columns where no terminal says how many
COLORS = {
    "base": "#4c72b0",
    "adapters": "#55a868",
    "optimizer": "#8172b3",
    "gradients": "#c44e52",
    "inputs": "#8c8c8c",
    "activations": "#dd8452",
    "loss": "#937860",
    "dequantized": "#64b5cd",
    "temporary": "#ccb974",
    "libraries": "#da8bc3",
}


def size(number: int) -> str:
    """As people read it."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def text(plan: MemoryPlan) -> str:
    console = Console(width=UNCUT, no_color=True)
    with console.capture() as captured:
        show(plan, console)
    return captured.get().rstrip("\n")


def print_plan(plan: MemoryPlan) -> None:
    """Print a plan to the terminal, or as it is into a file."""
    show(plan, Console(width=None if sys.stdout.isatty() else UNCUT))


def show(plan: MemoryPlan, console: Console) -> None:
    """Print a plan."""
    for name, line in lines(plan):
        console.print(f"{name:<13} {line}", highlight=False, markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="")
    for title in ("at the peak", "", "share"):
        table.add_column(title, justify="left" if title == "at the peak" else "right")
    for name, part in plan.at_peak.items():
        table.add_row(name, size(part), f"{part / plan.step_peak_bytes:.0%}")
    console.print(table)
    if plan.modes:
        modes = Table(box=None, pad_edge=False, header_style="")
        for title in ("checkpointing", "layers keep", "peak of a step"):
            modes.add_column(title, justify="left" if title == "checkpointing" else "right")
        for mode, found in plan.modes.items():
            modes.add_row(mode, size(found["layers"]), size(found["peak"]))
        console.print(modes)


def lines(plan: MemoryPlan) -> Iterator[tuple[str, str]]:
    """What a plan says, before its tables."""
    yield "model", f"{plan.model} in {plan.dtype} on {plan.device}, rank {plan.rank}"
    yield "batch", f"{plan.batch_size} × {plan.seq_len} tokens, checkpointing {plan.checkpointing}, {plan.optimizer}"
    yield "base", f"{size(plan.packed_bytes)} in NF4, {size(plan.dense_bytes)} dense"
    yield "trained", f"adapters {size(plan.adapter_bytes)}, as much for gradients, optimizer {_optimizer(plan)}"
    yield "layers keep", _layers(plan)
    if plan.conversion_peak_bytes:
        yield "converting", f"peak {size(plan.conversion_peak_bytes)}"
    yield "training", f"peak {size(plan.step_peak_bytes)} ({plan.peak_stage})"
    if plan.budget_bytes is not None:
        left = plan.budget_bytes - plan.peak_bytes
        said = f"fits, {size(left)} are left" if plan.fits else f"does not fit: {size(-left)} too much"
        yield "budget", f"{size(plan.budget_bytes)}: {said}"


def _optimizer(plan: MemoryPlan) -> str:
    paged = f" and {size(plan.paged_bytes)} paged, which the host has when the device is full"
    return size(plan.optimizer_bytes) + (paged if plan.paged_bytes else "")


def _layers(plan: MemoryPlan) -> str:
    found = f"{size(sum(plan.layer_bytes))} for backward, the rest {size(plan.other_kept_bytes)}"
    if plan.layer_bytes:
        low, high = min(plan.layer_bytes), max(plan.layer_bytes)
        each = size(high) if low == high else f"{size(low)} to {size(high)}"
        found = f"{found}; each of {len(plan.layer_bytes)} layers {each}"
    return found + (f"; {size(plan.host_bytes)} of it on the host" if plan.host_bytes else "")


def markdown(plan: MemoryPlan) -> str:
    rows = ["| at the peak | MiB | share |", "| --- | --- | --- |"]
    for name, part in plan.at_peak.items():
        rows.append(f"| {name} | {part / 2**20:,.1f} | {part / plan.step_peak_bytes:.0%} |")
    rows.append(f"| peak of a step | {plan.step_peak_bytes / 2**20:,.1f} | |")
    if plan.conversion_peak_bytes:
        rows.append(f"| peak while converting | {plan.conversion_peak_bytes / 2**20:,.1f} | |")
    return "\n".join(rows)


def plot(plan: MemoryPlan, path: Path) -> None:
    """One stacked bar of the peak, beside bars of other modes and of converting, and the budget as a line."""
    plt = plots.pyplot()
    plots.check_path(path)
    others = {"converting": plan.conversion_peak_bytes} if plan.conversion_peak_bytes else {}
    others |= {f"step, checkpointing {mode}": found["peak"] for mode, found in plan.modes.items()}
    figure, axis = plt.subplots(figsize=(9, 1.6 + 0.45 * len(others)))
    left = 0.0
    for name, part in plan.at_peak.items():
        axis.barh(0, part / 2**30, left=left, color=COLORS[name], label=name, height=0.6)
        left += part / 2**30
    for place, value in enumerate(others.values(), start=1):
        axis.barh(place, value / 2**30, color="#c8c8c8", height=0.6)
    axis.set_yticks(range(1 + len(others)), ["step, as planned", *others])
    axis.invert_yaxis()
    if plan.budget_bytes is not None:
        axis.axvline(plan.budget_bytes / 2**30, color="black", linestyle="--", label="budget")
    axis.set_xlabel("GiB")
    axis.set_title(f"{plan.model}, {plan.batch_size} × {plan.seq_len} tokens, rank {plan.rank}", fontsize=9)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    plots.save(figure, path)
