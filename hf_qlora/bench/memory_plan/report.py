"""The table and the picture of plans beside measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_qlora.bench.train_step.report import described
from hf_qlora.plots import pyplot, save


CLOSE = 0.10


def markdown(result: dict[str, Any]) -> str:
    """A row for each setting: peaks in MiB, and the plan's share of what was measured."""
    on_cpu = "heap" in result["settings"][0]
    lines = [
        f"{described(result['with'])}.",
        "",
        "| setting | converting: plan | measured | ÷ | a step: plan | measured | ÷ |"
        + (" as the heap keeps it |" if on_cpu else ""),
        "| --- " * (8 if on_cpu else 7) + "|",
    ]
    for row in result["settings"]:
        plan, measured = row["plan"], row["measured"]
        lines.append(
            f"| {row['setting']['name']} | {_pair(plan['conversion_peak_bytes'], measured['conversion'])} "
            f"| {_pair(plan['step_peak_bytes'], measured['step'])} |"
            + (f" {_mib(row['heap']['step'])} |" if on_cpu else "")
        )
    for what, key, found in (
        ("converting", "conversion_peak_bytes", "conversion"),
        ("a step", "step_peak_bytes", "step"),
    ):
        ratios = [row["plan"][key] / row["measured"][found] for row in result["settings"]]
        close = sum(abs(ratio - 1) <= CLOSE for ratio in ratios)
        lines += [
            "",
            f"{what}: {close} of {len(ratios)} within {CLOSE:.0%}; from {min(ratios):.3f} to {max(ratios):.3f} of "
            "what was measured.",
        ]
    return "\n".join(lines)


def _pair(plan: int, measured: int) -> str:
    return f"{_mib(plan)} | {_mib(measured)} | {plan / measured:.3f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of what was planned and measured for a step."""
    plt = pyplot()
    rows = result["settings"]
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.4 * len(rows)))
    for shift, color, label, sizes in (
        (-0.2, "#4c72b0", "planned", [row["plan"]["step_peak_bytes"] for row in rows]),
        (0.2, "#dd8452", "measured", [row["measured"]["step"] for row in rows]),
    ):
        axis.barh(
            [place + shift for place in range(len(rows))],
            [size / 2**20 for size in sizes],
            0.4,
            color=color,
            label=label,
        )
    axis.set_yticks(range(len(rows)), [row["setting"]["name"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("peak of a step, MiB")
    axis.legend()
    save(figure, path)
