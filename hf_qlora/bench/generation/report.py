"""The table and the picture of a measurement."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from hf_qlora.bench.train_step.report import described
from hf_qlora.plots import pyplot, save


def markdown(result: dict[str, Any]) -> str:
    """One row for each arm; ratios are of medians, with those of minima beside them."""
    case, arms = result["case"], result["arms"]
    rounds, count = len(next(iter(arms.values()))["generation_s"]), case["new_tokens"]
    lines = [
        f"{case['shape']}, batch {case['batch_size']}, {count} new tokens after {case['sequence_length']}, rank "
        f"{case['rank']}, {rounds} rounds; {described(result['with'])}.",
        "",
        "| arm | ms a token | least | tokens/s | ÷ its base | of minima | same tokens |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, arm in arms.items():
        median, least = (of(arm["generation_s"]) / count for of in (statistics.median, min))
        base, same = arms.get(arm["base"]), arm["same_tokens"]
        ratios = "| |"
        if base is not None:
            of_medians = median * count / statistics.median(base["generation_s"])
            ratios = f"{of_medians:.2f} | {least * count / min(base['generation_s']):.2f} |"
        lines.append(
            f"| {name} | {median * 1e3:.1f} | {least * 1e3:.1f} | {case['batch_size'] / median:.1f} | {ratios} "
            f"{'' if same is None else f'{same} of {count}'} |"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of time, with each round as a point."""
    plt = pyplot()
    arms, count = result["arms"], result["case"]["new_tokens"]
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.45 * len(arms)))
    places = range(len(arms))
    times = [[second / count * 1e3 for second in arm["generation_s"]] for arm in arms.values()]
    colors = ["#4c72b0" if arm["base"] == name else "#dd8452" for name, arm in arms.items()]
    axis.barh(places, [statistics.median(each) for each in times], color=colors, height=0.6)
    for place, each in zip(places, times, strict=True):
        axis.plot(each, [place] * len(each), "|", color="black", markersize=6, alpha=0.5)
    axis.set_yticks(places, list(arms))
    axis.invert_yaxis()
    axis.set_xlabel("ms a token (median; each round a mark); blue: a base, orange: the same with LoRA")
    save(figure, path)
