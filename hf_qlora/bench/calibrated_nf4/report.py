"""The tables and the picture of calibrated NF4."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_qlora.bench.calibrated_nf4.parts import BASES
from hf_qlora.bench.calibrated_nf4.run import read
from hf_qlora.plots import pyplot, save


Found = dict[str, Any]
SAMPLE_LENGTH = 60


def markdown(results: Path) -> str:
    """A table for each part that has runs."""
    runs: dict[str, list[tuple[dict[str, Any], Found]]] = {}
    for run, found in read(results):
        runs.setdefault(run.part, []).append((dict(run.settings), found))
    tables = [TABLES[part](runs[part]) for part in TABLES if part in runs]
    return "\n\n".join([*tables, _device(runs)] if tables else [])


def _merge(runs: list[tuple[dict[str, Any], Found]]) -> str:
    arms = [found["arms"] for _, found in runs]
    names = ("base", *(name for name in arms[0] if name != "base"))
    lines = [
        f"Merges of {len(runs)} adapters; the range over them in brackets. Kept: of what the adapter gains.",
        "",
        "| weights | loss, chats | kept | exact answers | loss, headlines |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in names:
        kept = [_kept(arm["base"], arm["unmerged"], arm[name]) for arm in arms]
        lines.append(
            f"| {name} | {_ranged([arm[name]['loss']['chats'] for arm in arms], '.3f')} "
            f"| {_ranged(kept, '.1%')} | {_ranged([arm[name]['exact'] for arm in arms], '.1%')} "
            f"| {_ranged([arm[name]['loss']['headlines'] for arm in arms], '.3f')} |"
        )
    return "\n".join([*lines, "", *_samples(arms[0], names)])


def _samples(arms: Found, names: Sequence[str]) -> list[str]:
    lines = ["| expected | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for i, (_, expected) in enumerate(arms["base"]["samples"]):
        cells = [_cell(expected), *(_cell(arms[name]["samples"][i][0]) for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(text: str) -> str:
    plain = " ".join(text.split()).replace("|", "\\|")
    return plain if len(plain) <= SAMPLE_LENGTH else f"{plain[:SAMPLE_LENGTH]}…"


def _loftq(runs: list[tuple[dict[str, Any], Found]]) -> str:
    lines = [
        "Adapters that start as LoftQ has it (arXiv 2310.08659).",
        "",
        "| weights | loss, chats |",
        "| --- | --- |",
    ]
    for name in ("unmerged", "nearest"):
        lines.append(f"| {name} | {_ranged([found[name]['chats'] for _, found in runs], '.3f')} |")
    return "\n".join(lines)


def _base(runs: list[tuple[dict[str, Any], Found]]) -> str:
    lines = [
        "The base alone. Closed: of what rounding to nearest loses.",
        "",
        "| base | loss, chats | closed | loss, headlines | closed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in (name for name in runs[0][1] if name != "with"):
        cells = []
        for domain in ("chats", "headlines"):
            cells.append(_ranged([found[name]["loss"][domain] for _, found in runs], ".3f"))
            cells.append(_ranged([_closed(found, name, domain) for _, found in runs], ".0%"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _trained(runs: list[tuple[dict[str, Any], Found]]) -> str:
    """Beside the same seed's adapter on the dense base, where there is one."""
    found = {(settings["base"], settings["seed"]): run for settings, run in runs}
    lines = [
        "Adapters trained on each base. Above dense: beside the loss of the same seed's adapter on the dense base.",
        "",
        "| base | loss before, chats | trained | above dense | headlines, trained | above dense |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for base in BASES:
        seeds = [seed for name, seed in found if name == base]
        if not seeds:
            continue
        cells = [_ranged([found[base, seed]["before"]["chats"] for seed in seeds], ".3f")]
        for domain in ("chats", "headlines"):
            cells.append(_ranged([found[base, seed]["loss"][domain] for seed in seeds], ".3f"))
            both = [seed for seed in seeds if ("dense", seed) in found]
            above = [found[base, seed]["loss"][domain] - found["dense", seed]["loss"][domain] for seed in both]
            cells.append(_ranged(above, "+.3f") if above and base != "dense" else "")
        lines.append(f"| {base} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _closed(found: Found, name: str, domain: str) -> float:
    nearest, dense = found["nearest"]["loss"][domain], found["dense"]["loss"][domain]
    return float((nearest - found[name]["loss"][domain]) / (nearest - dense))


def _compared(title: str, key: str) -> Callable[[list[tuple[dict[str, Any], Found]]], str]:
    def table(runs: list[tuple[dict[str, Any], Found]]) -> str:
        lines = [
            title,
            "",
            f"| {key} | merge: kept | error of outputs | base: loss, chats | error of outputs | loss, headlines | s |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for settings, found in sorted(runs, key=lambda run: run[0]["rows"]):
            merged, base = found["merged"], found["calibrated"]
            lines.append(
                f"| {settings[key]} | {_kept(found['base'], found['unmerged'], merged):.1%} | {merged['error']:.2%} "
                f"| {base['loss']['chats']:.3f} | {base['error']:.2%} | {base['loss']['headlines']:.3f} "
                f"| {merged['seconds']:.0f} |"
            )
        return "\n".join(lines)

    return table


def _caps(runs: list[tuple[dict[str, Any], Found]]) -> str:
    lines = [
        "Tokens whose inputs' norm is above so many medians counted as if it were that; the range over adapters in "
        "brackets.",
        "",
        "| rows | cap | merge: kept | base: loss, chats | closed | loss, headlines | closed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cap in dict.fromkeys(settings["cap"] for settings, _ in runs):
        own = [(settings, found) for settings, found in runs if settings["cap"] == cap]
        kept = [_kept(found["base"], found["unmerged"], found["merged"]) for _, found in own]
        cells = [str(own[0][0]["rows"]), "none" if cap is None else f"{cap:g}", _ranged(kept, ".1%")]
        for domain in ("chats", "headlines"):
            cells.append(_ranged([found["calibrated"]["loss"][domain] for _, found in own], ".3f"))
            closed = [_closed(found | {"nearest": found["base"]}, "calibrated", domain) for _, found in own]
            cells.append(_ranged(closed, ".0%"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cost(runs: list[tuple[dict[str, Any], Found]]) -> str:
    lines = [
        "Time and memory, of random weights.",
        "",
        "| hidden × MLP, layers | weights, M | s | ns a weight | model, MiB | peak above it, MiB "
        "| with freed blocks, MiB | largest H, MiB | hidden states, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for _, found in sorted(runs, key=lambda run: run[1]["hidden_size"]):
        count = found["quantized_params"]
        peaks = (found["peak_bytes"], found.get("heap_bytes"))  # the second on a CPU alone
        in_use, heap = ("" if peak is None else _mib(peak - found["model_bytes"]) for peak in peaks)
        lines.append(
            f"| {found['hidden_size']:,} × {found['intermediate_size']:,}, {found['num_hidden_layers']} "
            f"| {count / 1e6:,.0f} | {found['seconds']:.0f} | {found['seconds'] / count * 1e9:,.0f} "
            f"| {_mib(found['model_bytes'])} | {in_use} "
            f"| {heap} | {_mib(found['gram_bytes'])} | {_mib(found['hidden_states_bytes'])} |"
        )
    return "\n".join(lines)


def _commands(runs: list[tuple[dict[str, Any], Found]]) -> str:
    lines = [
        "The commands as a user waits for them, on SmolLM2 and chats.",
        "",
        "| command | rows | s | of these calibrating |",
        "| --- | --- | --- | --- |",
    ]
    for settings, found in runs:
        for name in ("quantize", "merge"):
            took = found[name]
            lines.append(f"| {name} | {settings['rows']} | {took['seconds']:.0f} | {took['calibrating']:.0f} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[list[tuple[dict[str, Any], Found]]], str]] = {
    "merge": _merge,
    "loftq": _loftq,
    "trained": _trained,
    "base": _base,
    "rows": _compared(
        "How many rows of 256 tokens are enough; errors are of each calibration's own held-out rows.", "rows"
    ),
    "caps": _caps,
    "methods": _compared("Ways to round, each against the default.", "name"),
    "cost": _cost,
    "commands": _commands,
}


def _kept(base: Found, unmerged: Found, merged: Found) -> float:
    """Of what the adapter gains on chats."""
    without = base["loss"]["chats"]
    return float((without - merged["loss"]["chats"]) / (without - unmerged["loss"]["chats"]))


def _ranged(values: Sequence[float], form: str) -> str:
    mean = format(statistics.fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f}"


def _device(runs: dict[str, list[tuple[dict[str, Any], Found]]]) -> str:
    names = ("torch", "transformers", "peft", "bitsandbytes", "code")
    found = {
        f"{made['device']}, {', '.join(f'{name} {made[name]}' for name in names)}, {made['date']}"
        for part in runs.values()
        for made in (found["with"] for _, found in part)
    }
    return f"SmolLM2-135M-Instruct in bfloat16 where the device says nothing else; {'; '.join(sorted(found))}."


def plot(results: Path, path: Path) -> None:
    """What more rows bring, for merges and for the base."""
    runs = sorted(
        ((dict(run.settings)["rows"], found) for run, found in read(results) if run.part == "rows"),
        key=lambda one: one[0],
    )
    if not runs:
        return
    nearest = {dict(run.settings)["seed"]: found for run, found in read(results) if run.part == "base"}
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    rows = [count for count, _ in runs]
    kept = [100 * (1 - _kept(found["base"], found["unmerged"], found["merged"])) for _, found in runs]
    _line(axes[0], rows, kept, "Merge: what is lost of the adapter's gain, %")
    lost = [found["calibrated"]["loss"]["chats"] - found["dense"]["loss"]["chats"] for _, found in runs]
    _line(axes[1], rows, lost, "Base: loss above the dense model's, nats")
    if nearest:
        found = next(iter(nearest.values()))
        gap = found["nearest"]["loss"]["chats"] - found["dense"]["loss"]["chats"]
        axes[1].axhline(gap, color="0.5", linestyle="--", label="rounded to nearest")
        axes[1].legend(frameon=False, loc="center right")
    for axis in axes:
        axis.set_ylim(bottom=0, top=axis.get_ylim()[1])
    save(figure, path)


def _line(axes: Any, rows: Sequence[int], values: Sequence[float], title: str) -> None:
    axes.plot(rows, values, marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows, [str(count) for count in rows])
    axes.set_xlabel("rows of 256 tokens")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
