"""What a case is: a name, what it says of itself, what it needs, and the function that measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_qlora.bench.quantization.rows import Row
from hf_qlora.bench.quantization.settings import Context, Sizes


@dataclass(frozen=True)
class Case:
    """One case of the suite.

    Attributes:
        title: of its section.
        reading: a sentence on how to read its tables.
        run: measures.
        need: bytes that it takes at most, about, of a model of such sizes.
        language: whether the model must be a causal language model.
        reference: the arm that others are compared with in the tables; "": none.
    """

    name: str
    title: str
    reading: str
    run: Callable[[Context], list[Row]]
    need: Callable[[Sizes], int]
    language: bool = True
    reference: str = ""
