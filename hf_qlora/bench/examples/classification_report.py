"""The tables of examples/text_classification.py, and the card of its recorded run: all of it from the results file."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from hf_qlora.bench.examples.classification import METHODS, RATES, study
from hf_qlora.bench.examples.runs import Run, Study, read, rows_of
from hf_qlora.bench.examples.statistics import Mean, mean_of, non_inferior, paired
from hf_qlora.bench.results import read_lines
from hf_qlora.bench.train_step.report import described, mib


NAMES = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA", "adaptive-depth": "adaptive-depth LoRA"}
REFERENCE, ASKED = "full", "qlora"
MARGIN = 0.5  # points of accuracy


def markdown(results: Path, ours: Study | None = None) -> str:
    """The tables of what is in the file; nothing where it has no seed with all methods and no cost.

    Args:
        ours: by default that of the table, without its script.
    """
    ours = ours or study(script=Path())
    rows, lines = rows_of(ours, results), read_lines(results)
    costs = [line for line in lines if line["part"] == "cost"]
    parts = [
        *(_scores(rows) if rows else ()),
        *(_costs(costs[-1]) if costs else ()),
        *_sweep(results),
    ]
    return "\n\n".join(parts)


def _scores(rows: dict[int, dict[str, Any]]) -> list[str]:
    lines = [
        "| method | accuracy, % | sd | worst | macro-F1, % | minus full | 95 % interval | trained | saved, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in METHODS:
        accuracy, last = _percent(rows, method, "accuracy"), next(iter(rows.values()))[method]["found"]
        found, f1 = mean_of(accuracy), mean_of(_percent(rows, method, "macro_f1"))
        beside = " | " if method == REFERENCE else _shown(difference(rows, method))
        lines.append(
            f"| {NAMES[method]} | {found.mean:.2f} | {_number(found.deviation)} | {min(accuracy):.2f} | {f1.mean:.2f} "
            f"| {beside} | {last['trained_parameters']:,} | {last['saved_bytes'] / 2**20:.1f} |"
        )
    one = next(iter(rows.values()))[ASKED]
    seeds = ", ".join(map(str, rows))
    where = sorted({described(row["with"]) for of_seed in rows.values() for row in of_seed.values()})
    count, steps = len(one["found"]["correct"]), one["found"]["settings"]["steps"]
    note = (
        f"Seeds {seeds}; {count:,} test texts, at most {steps} steps, float32. Intervals are Student's t of the "
        f"paired differences over the seeds, with one test set. {'; '.join(where)}."
    )
    return ["\n".join(lines), verdict(rows), note]


def difference(rows: dict[int, dict[str, Any]], method: str) -> Mean:
    """From full fine-tuning, in points of accuracy."""
    return paired(_percent(rows, method, "accuracy"), _percent(rows, REFERENCE, "accuracy"))


def verdict(rows: dict[int, dict[str, Any]]) -> str:
    """Whether QLoRA is shown to be non-inferior to full fine-tuning."""
    found = difference(rows, ASKED)
    shown = non_inferior(found, MARGIN)
    question = f"QLoRA is not worse than full fine-tuning by {MARGIN} points or more"
    if shown is None:
        return f"**Not shown**: {question}. One seed has no interval."
    limit = f"the 95 % interval of the difference is {found.low:+.2f} to {found.high:+.2f}"
    if shown:
        return f"**Shown**: {question}; {limit}."
    refuted = " All of it is below the margin: it is worse by more." if found.high < -MARGIN else ""
    return f"**Not shown**: {question}; {limit}, which reaches {-MARGIN:+} or lower.{refuted}"


def _percent(rows: dict[int, dict[str, Any]], method: str, metric: str) -> list[float]:
    return [100 * of_seed[method]["found"]["test"][metric] for of_seed in rows.values()]


def _shown(found: Mean) -> str:
    between = "" if math.isnan(found.low) else f"{found.low:+.2f} to {found.high:+.2f}"
    return f"{found.mean:+.2f} | {between}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _costs(line: dict[str, Any]) -> list[str]:
    methods = line["methods"]
    reference = methods[REFERENCE]
    lines = [
        "| method | step, s | ÷ full | peak, MiB | ÷ full | base, MiB | ÷ dense | loss | gradient norm |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in methods.items():
        step, peak = statistics.median(found["step_s"]), found["memory"]["peak"]
        lines.append(
            f"| {NAMES[name]} | {step:.3f} | {step / statistics.median(reference['step_s']):.2f} | {mib(peak)} "
            f"| {peak / reference['memory']['peak']:.2f} | {found['base_bytes'] / 2**20:.1f} "
            f"| {found['base_bytes'] / found['dense_bytes']:.3f} | {found['loss'][-1]:.4f} "
            f"| {found['gradient_norm'][-1]:.4f} |"
        )
    note = (
        f"Medians of {line['rounds']} steps, the methods in turn; peaks of steady steps in a process for each, above "
        f"what imports take. Weights as they lie in memory, without the adapter. {described(line['with'])}."
    )
    return ["\n".join(lines), note]


def _sweep(results: Path) -> list[str]:
    found: dict[str, dict[float, float]] = {}
    for run, row in read(results):
        if run.part == "sweep":
            rate = float(run.arguments[run.arguments.index("--learning-rate") + 1])
            found.setdefault(run.arm, {})[rate] = row["found"]["validation"]["accuracy"]
    if not found:
        return []
    tried = "; ".join(
        f"{NAMES[method]} " + ", ".join(f"{rate:g}: {100 * found[method][rate]:.1f}" for rate in sorted(found[method]))
        for method in RATES
        if method in found
    )
    return [
        f"Learning rates by accuracy (%) on the validation split, with a seed that the table does not have: {tried}."
    ]


def card(results: Path, ours: Study | None = None) -> str:
    """What the first seed's QLoRA run left as its README.md, with the table; nothing without that run."""
    ours = ours or study(script=Path())
    run = Run(ASKED, ours.seeds[0], (*ours.arguments, *ours.arms[ASKED]))
    row = dict(read(results)).get(run)
    if row is None:
        return ""
    table = f"## Beside other methods\n\n{markdown(results, ours)}"
    return f"{row['card'].rstrip()}\n\n{table}\n"


def document(results: Path, page: str, ours: Study | None = None) -> str:
    """The page with the tables between its two marks."""
    start, end = "<!-- results -->", "<!-- /results -->"
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    if not rest or end not in rest:
        raise ValueError(f"The page has no {start} … {end} to put the tables between.")
    found = markdown(results, ours)
    return f"{before}{start}\n{found}\n{end}{after}" if found else page
