"""Where the tables of an example's bench are shown: its model card, and its page of the docs, in a checkout."""

from __future__ import annotations

from pathlib import Path

from hf_qlora.bench.results import write_text


BEGIN, END = "<!-- results -->", "<!-- /results -->"  # in the page


def card(written: str, tables: str) -> str:
    """What a run left as its README.md, with the tables."""
    return f"{written.rstrip()}\n\n## Beside other methods\n\n{tables}\n"


def document(page: str, tables: str) -> str:
    """The page with the tables between its two marks.

    Raises:
        ValueError: it has no such marks.
    """
    before, begins, rest = page.partition(BEGIN)
    _, ends, after = rest.partition(END)
    if not begins or not ends:
        raise ValueError(f"The page has no {BEGIN} … {END} to put the tables between.")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def write(name: str, card_text: str, tables: str, checkout: Path) -> list[Path]:
    """Write model_cards/NAME.md and the tables into docs/NAME.md; which files were written."""
    model_card, page = checkout / "model_cards" / f"{name}.md", checkout / "docs" / f"{name}.md"
    write_text(model_card, card_text)
    write_text(page, document(page.read_text(encoding="utf-8"), tables))
    return [model_card, page]
