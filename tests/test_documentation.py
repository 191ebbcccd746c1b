"""What the README and docs say is so: links lead somewhere, messages exist, reference and tables are current."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from hf_qlora.bench import skip_list
from hf_qlora.bench.calibrated_nf4 import report as calibrated_nf4
from hf_qlora.bench.depth import report as depth
from hf_qlora.bench.generation import report as generation
from hf_qlora.bench.results import read_whole
from hf_qlora.bench.train_step import checkpointing, curves
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


def test_every_result_is_in_the_documentation() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for path in (ROOT / "results").iterdir():
        assert f"results/{path.name}" in text, path.name
