"""examples/text_generation.py: full fine-tuning, LoRA and QLoRA side by side, over seeds.

    sweep   each method at each of its rates, perplexity on the validation split → its rate
    runs    each method at its rate, for each seed → perplexity, BLEU and exact match on the test split
    cost    see generation_cost.py: memory, time of a step, speed of generating

Runs of one seed see the same examples in the same order, so that differences are paired. All that is printed comes
from the lines of the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_qlora.bench.examples import generation_cost
from hf_qlora.bench.examples.runs import Run, Study, example, perform_runs, read, rows_of
from hf_qlora.bench.examples.statistics import Mean, mean_of, non_inferior, paired
from hf_qlora.bench.train_step.report import described


SCRIPT = "text_generation.py"
SWEEP = "sweep"
BEGIN, END = "<!-- results -->", "<!-- /results -->"  # in the page of the docs
MARGIN = 0.5  # points of exact match
NAMES = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
SCORES = {"perplexity": ("perplexity", 3), "bleu": ("BLEU", 2), "exact_match": ("exact match, %", 2)}


@dataclass(frozen=True)
class Plan:
    """How much to do. Rates are text, as they are given to the example."""

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    rates: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "full": ("2e-5", "5e-5", "1e-4"),
            "lora": ("1e-3", "2e-3", "4e-3"),
            "qlora": ("1e-3", "2e-3", "4e-3"),
        }
    )
    sweep_seed: int = 100
    arguments: tuple[str, ...] = ()
    rounds: int = 10


QUICK = Plan(
    seeds=(1, 2),
    rates=dict.fromkeys(NAMES, ("1e-3",)),
    arguments=("--steps", "2", "--held-out", "8", "--answer-tokens", "8"),
    rounds=1,
)


def perform(plan: Plan, results: Path, device: str = "cpu", workers: int = 1, cost: bool = True) -> None:
    """Do what is not in the file `results`, and append it there: the sweep, the seeds, and what a step costs.

    Raises:
        ExampleError: a run that failed. What ended before is kept.
    """
    script = example(SCRIPT)
    perform_runs(script, list(sweep(plan)), results, device, workers)
    perform_runs(script, list(study(plan, results).runs()), results, device, workers)
    if cost:
        generation_cost.perform(results, plan.rounds, chosen_rates(plan, results), device)


def sweep(plan: Plan) -> Iterator[Run]:
    for method, rates in plan.rates.items():
        for rate in rates:
            own = (*plan.arguments, "--method", method, "--learning-rate", rate)
            yield Run(method, plan.sweep_seed, (*own, "--split", "validation", "--brief"), SWEEP)


def swept(plan: Plan, results: Path) -> dict[str, dict[str, float]]:
    """The perplexity on the validation split by method and rate, as far as it is known."""
    done = dict(read(results))
    found: dict[str, dict[str, float]] = {}
    for run in sweep(plan):
        if run in done:
            rate = run.arguments[run.arguments.index("--learning-rate") + 1]
            found.setdefault(run.arm, {})[rate] = done[run]["found"]["trained"]["perplexity"]
    return found


def chosen_rates(plan: Plan, results: Path) -> dict[str, str]:
    """Of each method the rate of the least perplexity; of all that have been tried."""
    return {method: min(found, key=found.__getitem__) for method, found in swept(plan, results).items()}


def study(plan: Plan, results: Path) -> Study:
    """The methods that the sweep is done for, at their rates."""
    arms = {
        method: ("--method", method, "--learning-rate", rate) for method, rate in chosen_rates(plan, results).items()
    }
    return Study(Path(SCRIPT) if not arms else example(SCRIPT), arms, plan.seeds, plan.arguments)


# The report


def markdown(results: Path, plan: Plan | None = None) -> str:
    """All tables, of the seeds that all methods have; empty where there are none."""
    plan = plan or Plan()
    rows = list(rows_of(study(plan, results), results).values())
    if not rows:
        return ""
    on = "; ".join(sorted({described(row["with"]) for arms in rows for row in arms.values()}))
    parts = [_quality(rows), _verdict(rows), _sizes(rows), _sweep(plan, results), generation_cost.markdown(results)]
    return "\n\n".join([*(part for part in parts if part), f"Run on {on}."])


Rows = list[dict[str, dict[str, Any]]]  # of each seed, by arm


def _scores(rows: Rows, arm: str, stage: str, score: str) -> list[float]:
    return [arms[arm]["found"][stage][score] for arms in rows]


def _quality(rows: Rows) -> str:
    first = next(iter(rows[0].values()))["found"]
    parts = []
    for score, (name, digits) in SCORES.items():
        lines = [
            f"| {name} | seeds | mean | sd | − full fine-tuning | 95 % interval | − LoRA | 95 % interval |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            f"| base, bfloat16 | | {first['base'][score]:.{digits}f} | | | | | |",
        ]
        if score == "perplexity" and "qlora" in rows[0]:
            nf4 = rows[0]["qlora"]["found"]["nf4"][score]
            lines.append(f"| base, NF4 | | {nf4:.{digits}f} | | | | | |")
        for arm in rows[0]:
            own = _scores(rows, arm, "trained", score)
            cells = [_difference(own, rows, arm, other, score, digits) for other in ("full", "lora")]
            mean = mean_of(own)
            lines.append(
                f"| {NAMES[arm]} | {mean.seeds} | {mean.mean:.{digits}f} | {mean.deviation:.{digits}f} | "
                f"{' | '.join(cells)} |"
            )
            if score == "perplexity" and arm != "full":
                merged = mean_of(_scores(rows, arm, "merged", score))
                spread = f"{merged.mean:.{digits}f} | {merged.deviation:.{digits}f}"
                lines.append(f"| {NAMES[arm]}, merged | {merged.seeds} | {spread} | | | | |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _difference(own: list[float], rows: Rows, arm: str, other: str, score: str, digits: int) -> str:
    if arm == other or other not in rows[0]:
        return " | "
    found = paired(own, _scores(rows, other, "trained", score))
    return f"{found.mean:+.{digits}f} | {found.low:+.{digits}f} to {found.high:+.{digits}f}"


def _verdict(rows: Rows) -> str:
    if not {"full", "qlora"} <= rows[0].keys():
        return ""
    pair = (_scores(rows, arm, "trained", "exact_match") for arm in ("qlora", "full"))
    difference: Mean = paired(*pair)
    shown = {True: "is", False: "is not shown to be", None: "cannot, with one seed, be shown to be"}
    return (
        f"By exact match QLoRA {shown[non_inferior(difference, MARGIN)]} non-inferior to full fine-tuning within "
        f"{MARGIN} points: its interval would have to lie above −{MARGIN}."
    )


def _sizes(rows: Rows) -> str:
    lines = [
        "| | trained parameters | of all | weights in training, MB | saved, MB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, row in rows[0].items():
        found = row["found"]
        trained, every = found["trained_parameters"], found["base_parameters"]
        lines.append(
            f"| {NAMES[arm]} | {trained:,} | {100 * trained / every:.2f} % | "
            f"{found['weight_bytes']['training'] / 1e6:.1f} | {found['saved_bytes'] / 1e6:.1f} |"
        )
    if "qlora" in rows[0]:
        weights = rows[0]["qlora"]["found"]["weight_bytes"]
        ratio = weights["base"] / weights["nf4"]
        lines += [
            "",
            f"The base takes {weights['base'] / 1e6:.1f} MB in bfloat16 and {weights['nf4'] / 1e6:.1f} MB in NF4: "
            f"{ratio:.2f} times less, since the embedding stays in bfloat16.",
        ]
    return "\n".join(lines)


def _sweep(plan: Plan, results: Path) -> str:
    chosen, lines = chosen_rates(plan, results), []
    for method, found in swept(plan, results).items():
        tried = ", ".join(
            f"**{rate}: {perplexity:.3f}**" if rate == chosen[method] else f"{rate}: {perplexity:.3f}"
            for rate, perplexity in found.items()
        )
        edge = chosen[method] in (plan.rates[method][0], plan.rates[method][-1])
        lines.append(f"* {NAMES[method]}: {tried}{'; none was tried beyond' if edge and len(found) > 1 else ''}")
    return "Learning rates, by the perplexity on the validation split with one seed:\n\n" + "\n".join(lines)


def card(results: Path, plan: Plan | None = None) -> str:
    """The card that the first seed's QLoRA run wrote, with the tables; empty where there is no such run."""
    plan = plan or Plan()
    for rows in rows_of(study(plan, results), results).values():
        if "qlora" in rows:
            written: str = rows["qlora"]["card"]
            return f"{written.rstrip()}\n\n## Beside other methods\n\n{markdown(results, plan)}\n"
    return ""


def write_pages(results: Path, cards: Path, docs: Path, plan: Plan | None = None) -> None:
    """Write `card` into the folder `cards`, and the tables into the page `docs`, where it has a place for them."""
    text = card(results, plan)
    if not text:
        return
    cards.mkdir(parents=True, exist_ok=True)
    _write(cards / "text_generation.md", text)
    if docs.is_file():
        page = docs.read_text(encoding="utf-8")
        start, end = page.find(BEGIN), page.find(END)
        if 0 <= start < end:
            _write(docs, f"{page[:start]}{BEGIN}\n\n{markdown(results, plan)}\n\n{page[end:]}")


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
