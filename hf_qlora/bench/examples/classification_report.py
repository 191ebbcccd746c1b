"""The tables of examples/text_classification.py, and the card of its recorded run: all of it from the results file."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from hf_qlora.bench.examples import pages, provenance
from hf_qlora.bench.examples.classification import COST, METHODS, NAMES, Plan
from hf_qlora.bench.examples.runs import Origin, last_origin, lines_of, rows_of
from hf_qlora.bench.examples.statistics import Mean, mean_of, two_way, verdict
from hf_qlora.bench.train_step.report import described, mib


REFERENCE, ASKED, DENSE = "full", "qlora", "lora"  # DENSE is ASKED but for NF4
MARGIN = 0.5  # points of accuracy

Rows = dict[int, dict[str, dict[str, Any]]]  # by seed and method


def markdown(results: Path, plan: Plan | None = None, ours: Origin | None = None) -> str:
    """The tables of what is in the file; empty where there is nothing.

    Args:
        ours: the script and the device; by default those of the last row of a CPU.
    """
    plan, ours = plan or Plan(), ours or last_origin(results)
    if ours is None:
        return ""
    rows = rows_of(plan.study(results, ours), results, ours)
    costs = lines_of(results, ours, COST)
    swept = plan.sweep.markdown(results, ours, NAMES)
    scores = _scores(rows, len(plan.seeds)) if rows else ()
    parts = [*scores, *([swept] if swept else ()), *(_costs(costs[-1]) if costs else ())]
    tried = [row for of_method in plan.sweep.rows(results, ours).values() for row in of_method.values()]
    shown = [*tried, *(row for of_seed in rows.values() for row in of_seed.values()), *costs[-1:]]
    return "\n\n".join([*parts, provenance.versions(shown)] if shown else parts)


def _scores(rows: Rows, planned: int) -> list[str]:
    lines = [
        "| method | accuracy, % | sd | worst | macro-F1, % | minus full | sd | 95 % interval | trained | saved, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    differences = {method: difference(rows, method) for method in METHODS if method != REFERENCE}
    for method in METHODS:
        accuracy, last = _percent(rows, method, "accuracy"), next(iter(rows.values()))[method]["found"]
        found, f1 = mean_of(accuracy), mean_of(_percent(rows, method, "macro_f1"))
        beside = " | | " if method == REFERENCE else _shown(differences[method])
        lines.append(
            f"| {NAMES[method]} | {found.mean:.2f} | {_number(found.deviation)} | {min(accuracy):.2f} | {f1.mean:.2f} "
            f"| {beside} | {last['trained_parameters']:,} | {last['saved_bytes'] / 2**20:.1f} |"
        )
    return ["\n".join(lines), verdict(differences[ASKED], MARGIN), _price(rows), _note(rows, planned)]


def _price(rows: Rows) -> str:
    """What NF4 costs, in words."""
    found = difference(rows, ASKED, DENSE)
    if math.isnan(found.low):
        shows = "one seed has no interval"
    else:
        holds = "; it holds 0: no difference is shown" if found.low <= 0 <= found.high else ""
        shows = f"95 % interval {found.low:+.2f} to {found.high:+.2f}{holds}"
    return (
        f"**The price of NF4**: {NAMES[ASKED]} minus {NAMES[DENSE]} is {found.mean:+.2f} points of accuracy ({shows})."
    )


def _note(rows: Rows, planned: int) -> str:
    seeds = f"{provenance.seeds(len(rows), planned)}: {', '.join(map(str, rows))}"
    where = sorted({described(row["with"]) for of_seed in rows.values() for row in of_seed.values()})
    found = next(iter(rows.values()))[ASKED]["found"]
    count, settings = len(found["correct"]), found["settings"]
    return (
        f"{seeds}; {count:,} test texts, float32. Training is of at most {settings['steps']} × "
        f"{settings['batch_size']} texts, which is less than a quarter of an epoch of all headlines: what is shown is "
        "for that budget. sd is over seeds; intervals are of the paired differences over seeds and test texts (both "
        f"drawn anew). {'; '.join(where)}."
    )


def difference(rows: Rows, method: str, reference: str = REFERENCE) -> Mean:
    """From another method, in points of accuracy: of each text with each seed, right is 100."""
    right, of_reference = (
        np.array([[100.0 * int(one) for one in of_seed[name]["found"]["correct"]] for of_seed in rows.values()])
        for name in (method, reference)
    )
    return two_way(right, of_reference)


def _percent(rows: Rows, method: str, metric: str) -> list[float]:
    return [100 * of_seed[method]["found"]["test"][metric] for of_seed in rows.values()]


def _shown(found: Mean) -> str:
    between = "" if math.isnan(found.low) else f"{found.low:+.2f} to {found.high:+.2f}"
    return f"{found.mean:+.2f} | {_number(found.deviation)} | {between}"


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
        f"Medians of {line['rounds']} steps, the methods in turn and each first as often, batches as in training. "
        "Peaks, with the longest texts too, in a process for each, above what imports take. Weights as they lie in "
        f"memory, without the adapter. {described(line['with'])}."
    )
    return ["\n".join(lines), note]


def card(results: Path, plan: Plan | None = None, ours: Origin | None = None) -> str:
    """What the last seed's QLoRA run left as its README.md, with the tables; empty without a whole seed."""
    plan, ours = plan or Plan(), ours or last_origin(results)
    rows = {} if ours is None else rows_of(plan.study(results, ours), results, ours)
    if not rows:
        return ""
    return pages.card(rows[max(rows)][ASKED]["card"], markdown(results, plan, ours))
