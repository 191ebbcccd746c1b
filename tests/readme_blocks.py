"""Run the ```python blocks of Markdown files in order, in one namespace and one scratch folder.

    python tests/readme_blocks.py README.md docs

The files of a folder go on from the first one: each begins with the names that it left. A block fenced with
```python alone leaves no names behind. One with anything else more, such as ```python notest, is shown and not run:
what needs a hub, a GPU or a certain processor.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any


BLOCK = re.compile(r"^```python( alone)?[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def run(path: Path, namespace: dict[str, Any]) -> int:
    """Run the blocks, with tracebacks that name the file's own lines, and return how many there were."""
    text = path.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        first_line = text.count("\n", 0, block.start(2))
        names = dict(namespace) if block[1] else namespace
        exec(compile("\n" * first_line + block[2], path, "exec"), names)
    return len(blocks)


if __name__ == "__main__":
    first = Path(sys.argv[1]).resolve()
    others = [page for folder in sys.argv[2:] for page in sorted(Path(folder).resolve().glob("*.md"))]
    names: dict[str, Any] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        counts = {first.name: run(first, names)}
        for page in others:
            counts[page.name] = run(page, dict(names))
        os.chdir(first.parent)
    if not counts[first.name]:
        sys.exit(f"{first.name} has no ```python block to run.")
    print(", ".join(f"{name}: {count} blocks ran" for name, count in counts.items() if count))
