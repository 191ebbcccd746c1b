"""What lies beside a calibrated merge: the rows that it was calibrated on, what was measured, and with which versions.

No path is in it, since merged models are given away.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from hf_qlora.config.record import write_json
from hf_qlora.merge.folder import RECORD_NAME
from hf_qlora.saving import versions


if TYPE_CHECKING:
    from hf_qlora.merge.report import MergeReport

FORMAT_VERSION = 1


def write_record(folder: Path, report: MergeReport) -> None:
    """Write it into the merged model's folder; nothing where the merge was not calibrated."""
    found = report.calibration
    if found is None:
        return
    values = {
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
    write_json(folder / RECORD_NAME, values)
