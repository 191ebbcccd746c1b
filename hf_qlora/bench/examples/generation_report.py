"""The tables of examples/text_generation.py, and the card of its recorded run: all of it from the results file.

Perplexities are compared by their ratio. Log perplexity is a ratio of sums, over N answers with T tokens. For the
bootstrap it is linearized: each seed s and answer i has a value, of which log perplexity is the mean over the answers,
and which varies as that does when answers are drawn anew. R is the mean over the seeds:

    R + (−log likelihood(s, i) − R · tokens(i)) · N / T
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_qlora.bench.examples import generation_cost, pages, provenance
from hf_qlora.bench.examples.generation import Plan
from hf_qlora.bench.examples.runs import Origin, last_origin, lines_of, read, rows_of
from hf_qlora.bench.examples.statistics import Mean, mean_of, paired, two_way, verdict
from hf_qlora.bench.train_step.report import described


NAMES = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
REFERENCES, ASKED = ("full", "lora"), "qlora"
MARGIN = 0.5  # points of exact match, as of accuracy in text classification

Rows = list[dict[str, dict[str, Any]]]  # of each seed, what its runs found, by arm
Values = npt.NDArray[np.float64]  # (seeds, answers)


def markdown(results: Path, plan: Plan | None = None, ours: Origin | None = None) -> str:
    """All tables, of the seeds that all methods have; empty where there are none.

    Args:
        ours: the script and the device; by default those of the last row of a CPU.
    """
    plan, ours = plan or Plan(), ours or last_origin(results)
    lines = [] if ours is None else list(rows_of(plan.study(results, ours), results, ours).values())
    if not lines or ours is None:
        return ""
    rows = [{arm: row["found"] for arm, row in of_seed.items()} for of_seed in lines]
    base = dict(read(results, ours)).get(plan.base, {}).get("found")
    on = "; ".join(sorted({described(row["with"]) for of_seed in lines for row in of_seed.values()}))
    parts = [
        _perplexities(rows, base),
        price(rows),
        _answers(rows, base),
        *([exactness(rows)] if {ASKED, "full"} <= rows[0].keys() else []),
        *([bleu(rows)] if {ASKED, "lora"} <= rows[0].keys() and len(rows) > 1 else []),
        _sizes(rows),
        plan.sweep.markdown(results, ours, NAMES),
        generation_cost.markdown(results, ours),
        _note(rows, len(plan.seeds)),
    ]
    made = provenance.versions(_shown(plan, results, ours, lines))
    return "\n\n".join([*(part for part in parts if part), f"Run on {on}.", made])


def _shown(plan: Plan, results: Path, ours: Origin, lines: Rows) -> list[dict[str, Any]]:
    """The rows that the tables are of."""
    tried = [row for of_method in plan.sweep.rows(results, ours).values() for row in of_method.values()]
    base = [row for run, row in read(results, ours) if run == plan.base]
    costs = {row["what"]: row for row in lines_of(results, ours, generation_cost.COST)}
    return [*tried, *base, *(row for of_seed in lines for row in of_seed.values()), *costs.values()]


def _perplexities(rows: Rows, base: dict[str, Any] | None) -> str:
    lines = [
        "| perplexity | mean | sd | ÷ full fine-tuning | 95 % interval | ÷ LoRA | 95 % interval | merged |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stage, name in (("base", "bfloat16"), ("nf4", "NF4")):
        if base is not None:
            lines.append(f"| base, {name} | {base[stage]['perplexity']:.3f} | | | | | | |")
    for arm in rows[0]:
        own = _mean(rows, arm, "trained", "perplexity")
        cells = [_beside(rows, arm, reference) for reference in REFERENCES]
        merged = "" if arm == "full" else f"{_mean(rows, arm, 'merged', 'perplexity').mean:.3f}"
        lines.append(f"| {NAMES[arm]} | {own.mean:.3f} | {_cell(own.deviation)} | {' | '.join(cells)} | {merged} |")
    return "\n".join(lines)


def _beside(rows: Rows, arm: str, reference: str) -> str:
    if arm == reference or reference not in rows[0]:
        return " | "
    found = ratio(rows, arm, reference)
    return f"{found.mean:.3f} | {'' if math.isnan(found.low) else f'{found.low:.3f} to {found.high:.3f}'}"


def ratio(rows: Rows, arm: str, reference: str) -> Mean:
    """Of two arms' perplexities, the geometric mean over the seeds, with an interval over seeds and answers."""
    logs = two_way(*(log_perplexities(rows, name) for name in (arm, reference)))
    return Mean(logs.seeds, math.exp(logs.mean), logs.deviation, math.exp(logs.low), math.exp(logs.high))


def log_perplexities(rows: Rows, arm: str) -> Values:
    """Values whose means over the answers are the seeds' log perplexities; see above."""
    negative = -np.array([of_seed[arm]["trained"]["log_likelihoods"] for of_seed in rows])
    tokens = np.array(rows[0][arm]["answer_tokens"])
    whole = negative.sum() / (len(rows) * tokens.sum())
    values: Values = whole + (negative - whole * tokens) * len(tokens) / tokens.sum()
    return values


def price(rows: Rows) -> str:
    """What NF4 costs, and QLoRA beside full fine-tuning, in words."""
    if ASKED not in rows[0]:
        return ""
    parts = []
    for reference, head in (("lora", "**The price of NF4**: "), ("full", "")):
        if reference in rows[0]:
            found = ratio(rows, ASKED, reference)
            times = f"{found.mean:.3f} times that of {NAMES[reference]} ({_shows(found)})"
            parts.append(f"{head}QLoRA's perplexity is {times}.")
    return " ".join(parts)


def _shows(found: Mean) -> str:
    if math.isnan(found.low):
        return "one seed has no interval"
    differs = "" if found.low > 1 or found.high < 1 else "; it holds 1: no difference is shown"
    return f"95 % interval {found.low:.3f} to {found.high:.3f}{differs}"


def _answers(rows: Rows, base: dict[str, Any] | None) -> str:
    lines = [
        "| answers | exact, % | sd | − full fine-tuning | 95 % interval | − LoRA | 95 % interval | BLEU | sd |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    if base is not None:
        lines.append(
            f"| base, bfloat16 | {base['base']['exact_match']:.2f} | | | | | | {base['base']['bleu']:.2f} | |"
        )
    for arm in rows[0]:
        exact, bleu = (_mean(rows, arm, "trained", score) for score in ("exact_match", "bleu"))
        cells = []
        for reference in REFERENCES:
            if arm == reference or reference not in rows[0]:
                cells.append(" | ")
            else:
                points = exact_difference(rows, arm, reference)
                between = "" if math.isnan(points.low) else f"{points.low:+.2f} to {points.high:+.2f}"
                cells.append(f"{points.mean:+.2f} | {between}")
        lines.append(
            f"| {NAMES[arm]} | {exact.mean:.2f} | {_cell(exact.deviation, 2)} | {' | '.join(cells)} | "
            f"{bleu.mean:.2f} | {_cell(bleu.deviation, 2)} |"
        )
    return "\n".join(lines)


def exact_difference(rows: Rows, arm: str, reference: str) -> Mean:
    """In points, with an interval over seeds and answers."""
    return two_way(*([_percents(of_seed[name]) for of_seed in rows] for name in (arm, reference)))


def _percents(found: dict[str, Any]) -> list[float]:
    return [100.0 * int(one) for one in found["trained"]["exact"]]


def exactness(rows: Rows) -> str:
    """Whether QLoRA answers as well as full fine-tuning, and if that cannot be said, that it cannot."""
    found = exact_difference(rows, ASKED, "full")
    said = verdict(found, MARGIN, of="exact match")
    undecided = not math.isnan(found.low) and found.low <= -MARGIN <= found.high
    count = len(rows[0][ASKED]["trained"]["exact"])
    return f"{said} It cannot be decided with {count} answers and {len(rows)} seeds." if undecided else said


def bleu(rows: Rows) -> str:
    """NF4's price by BLEU, which is of a whole corpus: its interval is over the seeds alone."""
    of_arm = {arm: [of_seed[arm]["trained"]["bleu"] for of_seed in rows] for arm in (ASKED, "lora")}
    found = paired(of_arm[ASKED], of_arm["lora"])
    differs = "" if found.low > 0 or found.high < 0 else "; it holds 0: no difference is shown"
    return (
        f"By BLEU, QLoRA − LoRA is {found.mean:+.2f} (95 % interval over the seeds alone, with these answers, "
        f"{found.low:+.2f} to {found.high:+.2f}{differs})."
    )


def _mean(rows: Rows, arm: str, stage: str, score: str) -> Mean:
    return mean_of([of_seed[arm][stage][score] for of_seed in rows])


def _cell(value: float, digits: int = 3) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _sizes(rows: Rows) -> str:
    lines = [
        "| weights | trained parameters | of all | in training, MB | saved, MB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, found in rows[0].items():
        count, every = found["trained_parameters"], found["base_parameters"]
        lines.append(
            f"| {NAMES[arm]} | {count:,} | {100 * count / every:.2f} % | {found['training_bytes'] / 1e6:.1f} | "
            f"{found['saved_bytes'] / 1e6:.1f} |"
        )
    if ASKED in rows[0]:
        found = rows[0][ASKED]
        dense, nf4 = found["base_bytes"], found["training_bytes"] - found["trained_bytes"]
        lines += [
            "",
            f"The base takes {dense / 1e6:.1f} MB in bfloat16 and {nf4 / 1e6:.1f} MB in NF4: {dense / nf4:.2f} times "
            "less, since the embedding stays in bfloat16.",
        ]
    return "\n".join(lines)


def _note(rows: Rows, planned: int) -> str:
    found = next(iter(rows[0].values()))
    tokens, versions = found["answer_tokens"], found["versions"]
    return (
        f"{provenance.seeds(len(rows), planned)}; {len(tokens)} answers of the test split with {sum(tokens):,} "
        f"tokens, {found['settings']['steps']} steps. Intervals are over seeds and answers, and would be wider if "
        "whole tasks were drawn, whose answers are alike. The first one, of QLoRA's perplexity beside LoRA's, is what "
        "was asked; none is adjusted for the others beside it. Learning rates were chosen by perplexity, with which "
        "exact match need not agree; methods are judged by both, at those rates. BLEU is sacrebleu's, "
        f"{found['trained']['bleu_signature']}; accelerate {versions['accelerate']}."
    )


def card(results: Path, plan: Plan | None = None, ours: Origin | None = None) -> str:
    """The card that the last seed's QLoRA run wrote, with the tables; empty where there is no such run."""
    plan, ours = plan or Plan(), ours or last_origin(results)
    rows = {} if ours is None else rows_of(plan.study(results, ours), results, ours)
    if not rows or ASKED not in (last := rows[max(rows)]):
        return ""
    return pages.card(last[ASKED]["card"], markdown(results, plan, ours))
