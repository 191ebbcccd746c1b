"""What a run of the suite found, as a file that is read back, gone on with, and compared.

    {"kind": "quantization", "format": 1, "model": {…}, "settings": {…},
     "cases": {"latency": {"with": {…}, "seconds": 81.2, "rows": [{"arm": …, "values": […]}, …]}, …}, "sha256": …}

A case is kept as soon as it is done, and not done again while the settings, the machine, the versions and the code are
those it was measured with. A file of another model or other settings is left alone: results of two would be in one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_qlora.bench.quantization.rows import Row
from hf_qlora.bench.results import read_whole, write_whole
from hf_qlora.validation import ConfigError


if TYPE_CHECKING:
    from rich.console import Console

KIND, FORMAT = "quantization", 1
FILE, PAGE = "results.json", "report.html"


@dataclass(frozen=True)
class Found:
    """One case's.

    Attributes:
        rows: what it measured.
        seconds: that it took.
        environment: on what; see `bench/measure.py`.
        notes: what was not measured as the case says, and why.
    """

    rows: tuple[Row, ...]
    seconds: float
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()

    def is_of(self, environment: Mapping[str, Any]) -> bool:
        """Whether it was measured in such an environment, on whichever day."""
        return {**self.environment, "date": ""} == {**environment, "date": ""}


@dataclass
class QuantizationResult:
    """What `QuantizationBenchmark.run` returns.

    Attributes:
        model: what identifies it: name, class, numbers of parameters, a hash of its config and of pieces of its files.
        settings: of the run.
        cases: by name, in the suite's order.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    cases: dict[str, Found] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, every raw round included."""
        cases = {
            name: {
                "with": found.environment,
                "seconds": found.seconds,
                "notes": list(found.notes),
                "rows": [row.to_dict() for row in found.rows],
            }
            for name, found in self.cases.items()
        }
        return {"kind": KIND, "format": FORMAT, "model": self.model, "settings": self.settings, "cases": cases}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizationResult:
        """What `to_dict` gave.

        Raises:
            ConfigError: it is of another kind or format, or not whole.
        """
        if values.get("kind") != KIND or values.get("format") != FORMAT:
            raise ConfigError(f"This is no result of `hf-qlora bench quantization` in format {FORMAT}.")
        try:
            cases = {
                name: Found(
                    tuple(map(Row.from_dict, case["rows"])), case["seconds"], case["with"], tuple(case["notes"])
                )
                for name, case in values["cases"].items()
            }
            return cls(dict(values["model"]), dict(values["settings"]), cases)
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"This result of `hf-qlora bench quantization` is not whole: {error!r}.") from error

    @classmethod
    def load(cls, path: Path) -> QuantizationResult:
        """A saved one, from its file or its folder.

        Raises:
            ConfigError: nothing there, or of another kind.
            ValueError: it was changed since it was measured.
        """
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"{file} is not there; measure first.")
        return cls.from_dict(read_whole(file))

    def keep(self, folder: Path) -> None:
        """Write the numbers alone."""
        write_whole(folder / FILE, self.to_dict())

    def save(self, folder: str | Path) -> Path:
        """Write the numbers, the plots (.png) and the page; the page's path.

        Raises:
            ImportError: matplotlib is not installed.
            ConfigError: no folder can be made there.
            OSError: the disk is full.
        """
        from hf_qlora.bench.quantization import page, pictures

        target = Path(folder)
        check_folder(target)
        self.keep(target)
        pictures.save_all(self, target)
        return page.write(self, target / PAGE)

    def table(self) -> str:
        """The tables as text."""
        from hf_qlora.bench.quantization import tables

        return tables.text(self)

    def show(self, console: Console | None = None) -> None:
        """Print the tables."""
        from hf_qlora.bench.quantization import tables

        tables.show(self, console)

    def __str__(self) -> str:
        return self.table()


def check_folder(target: Path) -> None:
    """Raise ConfigError unless files can be written into the folder; what is made to see that goes again."""
    missing = [path for path in (target, *target.parents) if not path.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise ConfigError(f"The results cannot be written into {target} ({error.strerror}); name a folder.") from error
    finally:
        for path in missing:
            if path.is_dir():
                path.rmdir()
