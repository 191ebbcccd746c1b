"""Write the reference: docs/api.md from the docstrings of the public names, docs/cli.md from the commands' own help.

python docs/generate.py
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_qlora


DOCS = Path(__file__).parent
SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields", "Example")
ENTRY = re.compile(r"(?P<names>[\w*., \[\]|]+?): (?P<text>.*)", re.DOTALL)


def api() -> str:
    """One section for each public name: its signature, docstring, and what it has beside."""
    names = sorted(hf_qlora.__all__, key=str.lower)
    lines = [
        "# API",
        "",
        "Everything that `import hf_qlora` offers, out of its docstrings (`python docs/generate.py`). The commands",
        "are in [cli.md](cli.md).",
        "",
        " · ".join(f"[`{name}`](#{name.lower()})" for name in names),
        "",
    ]
    for name in names:
        lines += [f"## {name}", "", *_described(getattr(hf_qlora, name), name)]
    return "\n".join(lines).rstrip() + "\n"


def cli() -> str:
    """The help of all commands, as typer writes it."""
    command = [
        sys.executable,
        "-m",
        "typer",
        "hf_qlora.cli",
        "utils",
        "docs",
        "--name",
        "hf-qlora",
        "--title",
        "Commands",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return found.stdout.strip() + "\n"


def _described(thing: Any, name: str) -> Iterator[str]:
    if not inspect.isclass(thing):
        yield from (_signature(thing, name), "", *_markdown(inspect.getdoc(thing) or ""))
        return
    configured = _own_fields(thing)
    if not configured:
        yield from (_signature(thing, name), "")
    yield from _markdown(inspect.getdoc(thing) or "")
    if configured:
        yield from ("**Fields** beside those of the class it extends:", "")
        yield from (f"* `{field.name}` = `{_default(field)}`: {field.metadata['help']}" for field in configured)
        yield ""
    for key, member in vars(thing).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if key.startswith("_") or not inspect.getdoc(function):
            continue
        if isinstance(function, property):
            yield from (f"**`.{key}`**", "", *_markdown(inspect.getdoc(function) or ""))
        elif inspect.isfunction(function) and not _inherits_docstring(thing, key):
            yield from (f"**`.{key}{_parameters(function)}`**", "", *_markdown(inspect.getdoc(function) or ""))


def _own_fields(thing: Any) -> list[Any]:
    """The fields of a config that say in their metadata what they are."""
    if not dataclasses.is_dataclass(thing):
        return []
    own = {
        name
        for base in thing.__mro__
        if base.__module__.startswith("hf_qlora.")
        for name in vars(base).get("__annotations__", {})
    }
    return [
        field
        for field in dataclasses.fields(thing)
        if field.name in own and "help" in field.metadata and field.init and field.name != "record"
    ]


def _inherits_docstring(thing: Any, key: str) -> bool:
    """Callbacks' events and the like: what their library documents is not documented again."""
    return any(hasattr(base, key) for base in thing.__mro__[1:]) and not vars(thing)[key].__doc__


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return f"{field.default_factory.__name__}()"


def _signature(thing: Any, name: str) -> str:
    return f"```text\n{name}{_parameters(thing)}\n```"


def _parameters(thing: Any) -> str:
    """Without types, which the docstrings tell, and without what is handed on."""
    parameters = []
    starred = False
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parameters.append("*")
            starred = True
        parameters.append(str(parameter.replace(annotation=parameter.empty)))
    return f"({', '.join(parameters)})"


def _markdown(docstring: str) -> list[str]:
    """A docstring's paragraphs as they are; its sections as lists."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", docstring + "\n", flags=re.MULTILINE)
    lines = [parts[0].strip(), ""]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        text = textwrap.dedent(body).strip()
        lines += [f"**{title}**", "", *(_entries(text) if title in ("Args", "Attributes", "Raises") else [text]), ""]
    return lines


def _entries(text: str) -> Iterator[str]:
    """`name: text` in a line, and what is indented below it."""
    for entry in re.split(r"\n(?=\S)", text):
        found = ENTRY.fullmatch(entry.strip())
        names, said = (found["names"], found["text"]) if found else ("", entry)
        flat = re.sub(r"\s*\n\s*", " ", said)
        yield f"* `{names}`: {flat}" if names else f"* {flat}"


if __name__ == "__main__":
    for file, text in (("api.md", api()), ("cli.md", cli())):
        aside = DOCS / f".{file}.partial"
        aside.write_text(text, encoding="utf-8")
        aside.replace(DOCS / file)
