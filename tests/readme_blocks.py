"""Run a Markdown file's ```python blocks in order, in one namespace and one scratch folder.

    python tests/readme_blocks.py README.md

A block fenced with anything more, such as ```python notest, is shown and not run: what needs a hub or a GPU.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any


BLOCK = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def run(path: Path) -> int:
    """Run the blocks, with tracebacks that name the file's own lines, and return how many there were."""
    text = path.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        first_line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * first_line + block[1], path, "exec"), namespace)
    return len(blocks)


if __name__ == "__main__":
    readme = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        count = run(readme)
        os.chdir(readme.parent)
    if not count:
        sys.exit(f"{readme.name} has no ```python block to run.")
    print(f"{readme.name}: {count} blocks ran")
