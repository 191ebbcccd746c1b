"""The model card: marked blocks in a README.md, which is extended and never overwritten.

    <!-- hf_qlora adapter 1f2e3d4c 5b6a7988 -->      what the model itself knows; written by every save
    <!-- hf_qlora training 90817263 -->              what was seen while training; written by ModelCardCallback
    <!-- hf_qlora quantized … -->, merged            the same of a base in NF4, or of a merged model

A block is replaced where it stands; all other text stays, but for sections of the usual templates that nobody has
filled in. Metadata is added to, and what a user has written wins. To tell a user's value from one that an earlier run
wrote, a block's marker keeps a short hash of each value that came with it.

Names (of models, data, adapters, metrics) come from strangers. In Markdown they are shown as code, on one line and
without what could end it; in Python as literals; in YAML as what the Hub allows, or not at all.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in its __all__


logger = logging.getLogger(__name__)

_HEADING = re.compile(r"^(#{1,6} |<!-- /?hf_qlora ).*$", re.MULTILINE)  # our marks part sections, too
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
# What generators write: transformers.modelcard.TrainingSummary, transformers.utils.hub.create_and_tag_model_card.
_GENERATED = "<!-- This model card has been generated automatically"
_FROM_SCRATCH = "This model was trained from scratch on an unknown dataset."
_RESULTS = re.compile(r"^It achieves the following results on the evaluation set:\s*?\n(- .*\n)*", re.MULTILINE)
_OF_A_RUN = ("## Training procedure", "### Training hyperparameters", "### Training results")
_UNFILLED = "More information needed"
_TRANSFORMERS_DESCRIPTION = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)
_VERSIONS = re.compile(r"(- (PEFT|TRL|Transformers|Pytorch|Datasets|Tokenizers):? \S+ )*")
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.\-]{0,63}")
_HARMLESS = str.maketrans({"<": "\u2039", ">": "\u203a", "`": "'"})  # angle quotation marks
LONGEST, LONGEST_SENTENCE = 200, 400
_SAME_PLACE = {"quantized": "(?:quantized|merged)", "merged": "(?:quantized|merged)"}  # a model is one of them


def code(value: Any, longest: int = LONGEST) -> str:
    """A value as one line of Markdown code that also fits into a table: nothing in it is markup."""
    return f"`{one_line(value, longest).replace('|', chr(92) + '|')}`"


def one_line(value: Any, longest: int = LONGEST) -> str:
    text = "".join(character if character.isprintable() else " " for character in str(value))
    text = " ".join(text.translate(_HARMLESS).split())
    return (text[: longest - 1] + "…" if len(text) > longest else text) or "-"


def literal(value: str) -> str:
    """A string as Python source that HTML and Markdown see nothing in."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("`", "\\u0060")


def hub_id(name: Any) -> str | None:
    """The name if a model or data set on the Hub could have it, else None: metadata with another is refused there."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return str(name)


def identifier(name: Any) -> str | None:
    """The name of a licence or metric if it is of the form that the Hub's lists have."""
    return name if isinstance(name, str) and _IDENTIFIER.fullmatch(name.replace("_", "-")) else None


def load(folder: Path) -> ModelCard | None:
    """The card in a folder, or a new one; None where there is one that cannot be read, which is then left alone."""
    path = folder / constants.REPOCARD_NAME
    if not path.is_file():
        return ModelCard("---\n{}\n---\n")
    try:
        found: ModelCard = ModelCard.load(path)
        return found
    except (ValueError, TypeError, yaml.YAMLError) as error:
        logger.warning("%s is left as it is: its metadata cannot be read (%s).", path, one_line(error))
        return None


def carry(before: Path, folder: Path) -> None:
    """Take the card of a folder that is to be replaced along."""
    if (before / constants.REPOCARD_NAME).is_file():
        shutil.copyfile(before / constants.REPOCARD_NAME, folder / constants.REPOCARD_NAME)


def write(folder: Path, card: ModelCard) -> None:
    """Write a card to a temporary name, and rename it."""
    path = folder / constants.REPOCARD_NAME
    folder.mkdir(parents=True, exist_ok=True)
    order = [key for key in (*_keys(path), *sorted(card.data.to_dict())) if card.data.to_dict().get(key) is not None]
    break_ = "\r\n" if "\r\n" in card.text else "\n"
    metadata = card.data.to_yaml(line_break=break_, original_order=list(dict.fromkeys(order)))
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        aside.write_bytes(f"---{break_}{metadata}{break_}---{break_}{card.text}".encode())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _keys(path: Path) -> list[str]:
    """The fields of a card in the order that its writer has given them."""
    block = REGEX_YAML_BLOCK.search(path.read_text(encoding="utf-8-sig")) if path.is_file() else None
    return list(yaml.safe_load(block[2]) or {}) if block else []


def extend(card: ModelCard, block: str, facts: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Put a block with its metadata into a card.

    Args:
        block: "adapter", "training", "quantized" or "merged", as in the template.
        facts: for the template; `license` is added, as it is in the end.
        data: fields of `ModelCardData`; lists are added to, and None takes out what an earlier block has written.
    """
    card.text = without_boilerplate(card.text, trained=block == "training")
    # Not past another beginning: a user may have removed an end, and what follows is theirs.
    inside = "(?:(?!<!-- hf_qlora ).)*?"
    place = _SAME_PLACE.get(block, block)
    marked = re.compile(rf"<!-- hf_qlora {place}([0-9a-f ]*)-->{inside}<!-- /hf_qlora {place} -->\n?", re.DOTALL)
    found = marked.search(card.text)
    before, now = set(found[1].split() if found else []), []
    for key, value in data.items():
        if value is not None:
            now += _merge(card.data, key, value, before)
        elif _digest(key, card.data.get(key)) in before:
            card.data[key] = None
    body = render(block, {**facts, "license": _license(card.data)})
    text = f"<!-- hf_qlora {' '.join([block, *now])} -->\n\n{body.strip()}\n\n<!-- /hf_qlora {block} -->\n"
    gap = "\n\n"
    if "\r\n" in card.text:
        text, gap = text.replace("\n", "\r\n"), "\r\n\r\n"
    start, end = found.span() if found else (len(card.text), len(card.text))
    head = card.text[:start].rstrip()
    card.text = f"{head}{gap}{text}{card.text[end:]}" if head else text + card.text[end:]


def add_citations(card: ModelCard, made: ModelCard | None) -> None:
    """Keep the section of that name from what another generator made."""
    sections = _sections(made.text) if made is not None else []
    there = {heading for heading, _ in _sections(card.text)}
    for heading, body in sections:
        if heading == "## Citations" and heading not in there:
            card.text = f"{card.text.rstrip()}\n\n{heading}{body.rstrip()}\n"


def render(block: str, facts: Mapping[str, Any]) -> str:
    template = _template()
    return re.sub(r"\n{3,}", "\n\n", "".join(template.blocks[block](template.new_context(dict(facts)))))


@functools.cache
def _template() -> jinja2.Template:
    source = Path(__file__).with_name("card_template.md").read_text(encoding="utf-8")
    return jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(source)


def _license(data: CardData) -> str | None:
    named = data.get("license")
    if not named:
        return None
    name, link = data.get("license_name"), str(data.get("license_link") or "")
    shown = code(named if not name else f"{named}: {name}")
    return f"[{shown}]({link})" if re.fullmatch(r"https://[\w./%~-]+", link) else shown


def _merge(data: CardData, key: str, value: Any, before: set[str]) -> list[str]:
    """Add to one field, without what an earlier block added; return the hashes of what is ours now."""
    existing = data.get(key)
    if not isinstance(value, list):
        if existing and _digest(key, existing) not in before:
            return []
        data[key] = value
        return [_digest(key, value)]
    existing = [existing] if isinstance(existing, str) else existing or []
    kept = [item for item in existing if _digest(key, item) not in before]
    added = [item for item in value if not any(_same(item, other) for other in kept)]
    data[key] = kept + added or None
    return [_digest(key, item) for item in added]


def _digest(key: str, value: Any) -> str:
    return hashlib.sha256(f"{key}={value!r}".encode()).hexdigest()[:8]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, EvalResult) and isinstance(other, EvalResult):
        return one.unique_identifier == other.unique_identifier and one.metric_type == other.metric_type
    return bool(one == other)


def without_boilerplate(text: str, trained: bool = False) -> str:
    """A card's text without those sections of the usual templates that nobody has filled in.

    Args:
        trained: also without what Trainer has generated of a run, and nobody has proofread.
    """
    text = text.replace(_FROM_SCRATCH, "")
    generated = trained and _GENERATED in text
    if generated:
        start = text.index(_GENERATED)
        text = _RESULTS.sub("", text[:start] + text[text.index("-->", start) + 3 :])
    sections, kept = _sections(text), list[str]()
    within = 0  # the level of the section kept last; those that it belongs to are kept, too
    for heading, body in reversed(sections):
        level = len(heading) - len(heading.lstrip("#"))
        if not _is_boilerplate(heading.strip(), body, generated) or level < within:
            kept.insert(0, heading + body)
            within = level
    return "".join(kept)


def _is_boilerplate(heading: str, body: str, generated: bool) -> bool:
    text = " ".join(body.split())
    if generated and heading in _OF_A_RUN:
        return True
    if heading.endswith(" Framework versions"):
        return bool(_VERSIONS.fullmatch(text + " "))
    return heading != "" and (text == _UNFILLED or text in _unfilled_template().get(heading, ()))


@functools.cache
def _unfilled_template() -> dict[str, tuple[str, ...]]:
    """What is under each heading of huggingface_hub's template, as PEFT and transformers leave it."""
    found: dict[str, tuple[str, ...]] = {}
    for given in ({}, {"model_description": _TRANSFORMERS_DESCRIPTION}):
        for heading, body in _sections(ModelCard.from_template(ModelCardData(), **given).text):
            found[heading] = (*found.get(heading, ()), " ".join(body.split()))
    return found


def _sections(text: str) -> list[tuple[str, str]]:
    """(heading, what follows up to the next one); the first has no heading. Lines in code blocks are none."""
    fenced = [match.span() for match in _FENCE.finditer(text)]
    marks = [m for m in _HEADING.finditer(text) if not any(low <= m.start() < high for low, high in fenced)]
    starts = [match.start() for match in marks]
    ends = [*starts[1:], len(text)] if starts else []
    parts = [("", text[: starts[0]] if starts else text)]
    return parts + [(m[0], text[m.end() : end]) for m, end in zip(marks, ends, strict=True)]
