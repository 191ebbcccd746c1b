"""The table and the picture of a measurement."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from hf_qlora.bench.train_step.arms import FLOOR
from hf_qlora.plots import pyplot, save


def markdown(result: dict[str, Any]) -> str:
    """One row for each arm; ratios are of medians, with those of minima beside them."""
    case, arms = result["case"], result["arms"]
    rounds = len(next(iter(arms.values()))["step_s"])
    reference = FLOOR if FLOOR in arms else next(iter(arms))
    lines = [
        f"{case['shape']}, {case['batch_size']} × {case['sequence_length']} tokens, rank {case['rank']}, "
        f"{rounds} rounds; {described(result['with'])}.",
        "",
        f"| arm | step, s | ÷ {reference} | of minima | tokens/s | peak, MiB | adapters save, MiB | of GEMM rate "
        "| loss | gradient norm |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, arm in arms.items():
        median, least = statistics.median(arm["step_s"]), min(arm["step_s"])
        work = result["flops"]["base"] + (result["flops"]["adapters"] if arm["trained_parameters"] else 0)
        ratio = median / statistics.median(arms[reference]["step_s"])
        ratio_of_minima = least / min(arms[reference]["step_s"])
        tokens = case["batch_size"] * case["sequence_length"]
        unseen = arm["trained_parameters"] and not arm["saved_bytes"]  # compiled layers show nothing of what they keep
        saved = "not seen" if unseen else mib(arm["saved_bytes"])
        lines.append(
            f"| {name} | {median:.3f} | {ratio:.2f} | {ratio_of_minima:.2f} | {tokens / median:,.0f} "
            f"| {mib(arm['memory']['peak'])} | {saved} "
            f"| {work / median / result['gemm_flops_per_s']:.0%} | {arm['loss']:.4f} | {arm['gradient_norm']:.4f} |"
        )
    lines += ["", "Of attention's arithmetic only the half that a causal mask leaves is counted."]
    imports = max(arm["memory"]["imports"] for arm in arms.values())
    lines += ["", f"Peaks are less what the imports take by themselves, {mib(imports)} MiB."]
    return "\n".join(lines)


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def described(with_: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {with_[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    processor = f"{with_['device']} {with_['capability']}".rstrip()
    threads = "1 thread" if with_["threads"] == 1 else f"{with_['threads']} threads"
    return f"{processor}, {threads}, {packages}, {with_['date']}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of time, with each round as a point, and of memory."""
    plt = pyplot()
    arms = result["arms"]
    figure, (time, space) = plt.subplots(1, 2, figsize=(11, 0.8 + 0.45 * len(arms)), sharey=True)
    places = range(len(arms))
    time.barh(places, [statistics.median(arm["step_s"]) for arm in arms.values()], color="#4c72b0", height=0.6)
    for place, arm in zip(places, arms.values(), strict=True):
        time.plot(arm["step_s"], [place] * len(arm["step_s"]), "|", color="black", markersize=6, alpha=0.5)
    time.set_yticks(places, list(arms))
    time.invert_yaxis()
    time.set_xlabel("step, s (median; each round a mark)")
    space.barh(places, [arm["memory"]["peak"] / 2**20 for arm in arms.values()], color="#dd8452", height=0.6)
    space.set_xlabel("peak of steady steps, MiB")
    save(figure, path)
