"""Saved bases and adapters to merge, tiny and random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import llama
from merging import adapted
from torch import nn


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny models are slower on two threads."""
    torch.set_num_threads(1)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Save a base and an adapter that was trained on it; their folders."""

    def save(
        model: nn.Module | None = None, dtype: torch.dtype = torch.float32, base_options: Any = None, **settings: Any
    ) -> tuple[Path, Path]:
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        made = (llama() if model is None else model).to(dtype)
        made.save_pretrained(base, **(base_options or {}))
        adapted(type(made).from_pretrained(base), **settings).save_pretrained(adapter)
        return base, adapter

    return save
