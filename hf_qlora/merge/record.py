"""What lies beside a merged model: its card, and of a calibrated one the rows, what was measured, and the versions.

No path is in it, since merged models are given away.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from hf_qlora.config.record import write_json
from hf_qlora.hub import card
from hf_qlora.hub.merged import Merged, write_merged_card
from hf_qlora.merge.folder import RECORD_NAME
from hf_qlora.saving import versions


if TYPE_CHECKING:
    from hf_qlora.merge.report import MergeReport

FORMAT_VERSION = 1


def describe(folder: Path, report: MergeReport, kind: str, base: Path, adapter: Path | None, before: Path) -> None:
    """Write card and record into the merged model's folder.

    Args:
        kind: the name of the model's class.
        base, adapter: the folders that they were read from.
        before: the folder that is replaced, whose card goes on.
    """
    name = report.original or report.base
    card.carry(before, folder)
    merged = Merged(
        kind=kind,
        dtype=report.dtype,
        packed=report.onto == "nf4",
        base="" if name == kind else name,
        base_folder=base,
        adapters=report.adapters,
        adapter_folder=adapter,
    )
    write_merged_card(folder, merged, report.card_rows())
    if report.calibration is not None:
        write_json(folder / RECORD_NAME, _record(report))


def _record(report: MergeReport) -> dict[str, object]:
    found = report.calibration
    assert found is not None
    return {
        "format_version": FORMAT_VERSION,
        "onto": report.onto,
        "kept": report.kept,
        "kept_by": report.kept_by,
        "losses": report.losses,
        "outputs": None if report.outputs is None else dataclasses.asdict(report.outputs),
        "calibration": {
            "source": found.rows,
            "rows": found.count,
            "tokens": found.tokens,
            "held_out": found.held_out,
            "fingerprint": found.fingerprint,
        },
        "report": found.to_dict(),
        "versions": versions(),
    }
