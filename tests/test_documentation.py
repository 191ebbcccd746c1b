"""What the README and docs say is so: links lead somewhere, messages exist, reference and tables are current."""

from __future__ import annotations

import importlib.util
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from hf_qlora.bench import callbacks, skip_list
from hf_qlora.bench.calibrated_nf4 import report as calibrated_nf4
from hf_qlora.bench.depth import report as depth
from hf_qlora.bench.examples import classification, classification_report, runs
from hf_qlora.bench.examples import generation as generation_example
from hf_qlora.bench.examples.rates import OPTION
from hf_qlora.bench.generation import report as generation
from hf_qlora.bench.memory_plan import report as memory_plan
from hf_qlora.bench.quantization.result import QuantizationResult
from hf_qlora.bench.results import read_whole
from hf_qlora.bench.train_step import checkpointing, curves, growth
from hf_qlora.bench.train_step import report as train_step


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE = ROOT / "hf_qlora"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in _anchors(file), target


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_messages_of_the_readme_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `([^|]+)` (\([^|]*\) )?\|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    own = [message for message, whose in rows if whose in ("", "(a warning) ")]
    assert len(own) >= 7
    joined = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")))
    for message in own:
        for piece in filter(None, (piece.strip() for piece in message.split("…"))):
            assert piece in joined, message


@pytest.mark.parametrize("name", ["api", "cli"])
def test_the_reference_is_current(name: str) -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") == getattr(generate, name)(), (
        "run python docs/generate.py"
    )


WHOLE: dict[str, tuple[str, Any]] = {
    "train_step_cpu.json": ("training.md", train_step),
    "train_step_h200.json": ("training.md", train_step),
    "train_step_avx2.json": ("training.md", train_step),
    "growth.json": ("training.md", growth),
    "checkpointing_h200.json": ("training.md", checkpointing),
    "generation_cpu.json": ("generation.md", generation),
    "skip_list.json": ("quantizing.md", skip_list),
}


@pytest.mark.parametrize("name", WHOLE)
def test_tables_are_those_of_the_results(name: str) -> None:
    page, report = WHOLE[name]
    _is_in(page, report.markdown(read_whole(ROOT / "results" / name)))


@pytest.mark.parametrize(
    ("name", "page", "report"),
    [
        ("learning_curve.jsonl", "training.md", curves),
        ("adaptive_depth.jsonl", "adaptive_depth.md", depth),
        ("adaptive_depth_concentration.jsonl", "adaptive_depth.md", depth),
        ("calibrated_nf4.jsonl", "calibrated_nf4.md", calibrated_nf4),
        ("calibrated_nf4_cpu.jsonl", "calibrated_nf4.md", calibrated_nf4),
        ("calibrated_nf4_float32.jsonl", "calibrated_nf4.md", calibrated_nf4),
    ],
)
def test_tables_are_those_of_the_runs(name: str, page: str, report: Any) -> None:
    _is_in(page, report.markdown(ROOT / "results" / name))


def _is_in(page: str, table: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert rows
    missing = [row for row in rows if row not in text]
    assert not missing, "\n".join(missing)


def test_the_figures_of_the_readme_are_those_of_the_results() -> None:
    """The rows of "What was measured", worked out here from the raw results."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith("| ")]
    cpu, gpu, generating = (_arms(name) for name in ("train_step_cpu", "train_step_h200", "generation_cpu"))
    loops = _arms("train_step_avx2")
    stock, tuned, ours = "stock, as documented", "stock, all bfloat16", "ours"
    memory = [arms[ours]["memory"]["peak"] / arms[stock]["memory"]["peak"] for arms in (cpu, gpu)]
    times = [_median(arms[ours]["step_s"]) / _median(arms[stock]["step_s"]) for arms in (cpu, gpu)]
    in_loops = [_median(loops[ours]["step_s"]) / _median(loops[arm]["step_s"]) for arm in (stock, tuned)]
    by_hand = _median(cpu[ours]["step_s"]) / _median(cpu[tuned]["step_s"])
    fast = [
        _median(generating[f"{arm}, fast_generation"]["generation_s"]) / _median(generating[arm]["generation_s"])
        for arm in ("NF4", "NF4 + LoRA")
    ]
    for start, figures in {
        "| Memory of a training step": [f"{value:.2f}" for value in memory],
        "| its time, ÷ the same": [f"{value:.2f}" for value in times],
        "| its time, ÷ stock with everything": [f"{by_hand:.2f}"],
        "| its time in bfloat16 on a CPU with AVX2": [f"{value:.2f}" for value in in_loops],
        "| What a 4-bit merge keeps": ["97.6%", "26.4%"],
        "| What a calibrated base": ["87%", "36%"],
        "| Generating on a CPU": [f"{value:.2f}" for value in fast],
    }.items():
        (row,) = (row for row in rows if row.startswith(start))
        assert all(figure in row for figure in figures), (start, figures)
    # these stand in tables that are held to their results above
    page = _lines("calibrated_nf4.md")
    for start, figure in (
        ("| calibrated, chats |", "| 97.6% ("),
        ("| PEFT's merge |", "| 26.4% ("),
        ("| calibrated, chats |", "| 87% ("),
        ("| calibrated, headlines |", "| 36% ("),
    ):
        assert any(line.startswith(start) and figure in line for line in page), start


def test_what_the_readme_says_of_classification() -> None:
    """Worked out here from the rows; the intervals are those that the report has computed."""
    plan, file = classification.Plan(), ROOT / "results" / "text_classification.jsonl"
    of_runs, costs = _rows(plan, file)
    accuracy = {
        arm: statistics.mean(row["test"]["accuracy"] for row in of_runs[arm].values())
        for arm in ("full", "lora", "qlora")
    }
    (cost,) = (row["methods"] for row in costs)
    step = _median(cost["qlora"]["step_s"]) / _median(cost["full"]["step_s"])
    peak = cost["qlora"]["memory"]["peak"] / cost["full"]["memory"]["peak"]
    told = classification_report.markdown(file, plan)
    low, high = _interval(told, "its")
    price = _interval(told, r"points of accuracy \(")
    (said,) = (line for line in _lines("../README.md") if line.startswith("| QLoRA against full fine-tuning (MiniLM"))
    worse = f"{100 * (accuracy['full'] - accuracy['qlora']):.2f} points of accuracy worse"
    assert f"{worse} ({_number(-high)} to {_number(-low)})" in said
    better = f"{100 * (accuracy['qlora'] - accuracy['lora']):.2f} better than LoRA"
    assert f"({better}, {_number(price[0])} to {_number(price[1])})" in said
    assert f"step {step:.2f}, peak {peak:.2f} of its" in said
    page = "\n".join(_lines("text_classification.md"))
    missing = f"{100 * (accuracy['full'] - accuracy['qlora']):.2f} points that are missing"
    assert f"at most {-price[0]:.2f} of the {missing}" in page
    packed, dense = (cost["qlora"][name] for name in ("base_bytes", "dense_bytes"))
    assert f"takes {packed / dense:.2f} of its bytes" in page.replace("\n", " ")


def test_what_the_readme_says_of_generation() -> None:
    """Worked out here from the rows of whole seeds, by the geometric mean over them."""
    plan, file = generation_example.Plan(), ROOT / "results" / "text_generation.jsonl"
    of_runs, costs = _rows(plan, file)
    ours = runs.last_origin(file)
    assert ours is not None
    seeds = [
        {arm: math.log(of_runs[arm][seed]["trained"]["perplexity"]) for arm in of_runs} for seed in of_runs["qlora"]
    ]
    above = [math.exp(statistics.mean(one["qlora"] - one[other] for one in seeds)) for other in ("lora", "full")]
    (base,) = (row["found"]["nf4"]["perplexity"] for row in runs.lines_of(file, ours, generation_example.BASE))
    trained = statistics.mean(math.exp(one["qlora"]) for one in seeds)
    cost = {row["what"]: row["found"] for row in costs}
    step = _median(cost["time"]["qlora"]["step_s"]) / _median(cost["time"]["full"]["step_s"])
    peak = cost["memory"]["qlora"]["peak"] / cost["memory"]["full"]["peak"]
    (said,) = (line for line in _lines("../README.md") if line.startswith("| The price of NF4 (SmolLM2-135M"))
    assert f"{len(seeds)} seeds" in said
    assert f"{above[0]:.3f} times LoRA's and {above[1]:.3f} times full fine-tuning's" in said
    assert f"{base:.1f} in NF4 before training, {trained:.1f} after" in said
    assert f"step {step:.2f}, peak {peak:.2f} of" in said
    page = "\n".join(_lines("text_generation.md"))
    assert "**Not decided**: that QLoRA loses less than 0.5 points of exact match" in page


def _rows(plan: Any, file: Path) -> tuple[dict[str, dict[int, Any]], list[Any]]:
    """What the runs found, by arm and seed, and the lines of the cost: of the last origin, at the chosen rates."""
    ours = runs.last_origin(file)
    assert ours is not None
    arms = plan.study(file, ours).arms
    found: dict[str, dict[int, Any]] = {arm: {} for arm in arms}
    for row in runs.lines_of(file, ours, runs.RUNS):
        rate = row["arguments"][row["arguments"].index(OPTION) + 1]
        if rate == arms[row["arm"]][arms[row["arm"]].index(OPTION) + 1]:
            found[row["arm"]][row["seed"]] = row["found"]
    assert len(set.intersection(*(set(of_arm) for of_arm in found.values()))) >= 5
    assert len({frozenset(of_arm) for of_arm in found.values()}) == 1
    return found, runs.lines_of(file, ours, "cost")


def _interval(told: str, head: str) -> tuple[float, float]:
    """The one interval of a report's text with this before it."""
    ((low, high),) = re.findall(rf"{head}\s?95 % interval ([+-][\d.]+\d) to ([+-][\d.]+\d)", told)
    return float(low), float(high)


def _number(value: float) -> str:
    """As the README writes it."""
    return f"{value:.2f}".replace("-", "−")


def test_plans_of_the_readme_and_of_its_page() -> None:
    ratios = []
    for name in ("memory_plan_cpu", "memory_plan_h200"):
        found = memory_plan.markdown(read_whole(ROOT / "results" / f"{name}.json"))
        ratios += [float(number) for number in re.search(r"a step: .* from (\S+) to (\S+) of", found).groups()]  # type: ignore[union-attr]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"planned ÷ measured, 33 settings on a CPU and a GPU | {min(ratios):.3f} to {max(ratios):.3f} |" in readme
    rows = memory_plan.markdown(read_whole(ROOT / "results" / "memory_plan_cpu.json")).splitlines()
    shown = [line for line in _lines("memory.md") if re.match(r"\| .* \| \d+ \| \d+ \| 1\.\d+ \|", line)]
    assert len(shown) >= 5
    assert not [line for line in shown if line not in rows]


def test_what_callbacks_cost() -> None:
    found = callbacks.markdown(read_whole(ROOT / "results" / "callbacks_cpu.json"))
    both = next(line for line in found.splitlines() if line.startswith("| both "))
    _, _, rounds, minima, _, share = (cell.strip() for cell in both.strip("|").split("|"))
    text = " ".join(_lines("training.md"))
    for figure in (f"{float(share[:-1]):.1f} %", f"{float(rounds):.3f}", f"{float(minima):.3f}"):
        assert figure in text, figure


def _arms(name: str) -> Any:
    return read_whole(ROOT / "results" / f"{name}.json")["arms"]


def _median(values: list[float]) -> float:
    return float(statistics.median(values))


def _lines(page: str) -> list[str]:
    return (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()


def test_the_suites_tables_are_those_of_its_result() -> None:
    table = {
        line.rstrip() for line in QuantizationResult.load(ROOT / "results" / "quantization_cpu").table().splitlines()
    }
    page = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8").split("## SmolLM2 on two cores")[1]
    shown = page.split("```")[1].splitlines()
    assert len(shown) > 30
    assert not [line for line in shown if line and line.rstrip() not in table]


def test_every_result_is_in_the_documentation() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for path in (ROOT / "results").glob("[!.]*"):  # measuring leaves a lock
        assert f"results/{path.name}" in text, path.name
