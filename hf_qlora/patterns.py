"""Whether a regular expression for module names can be matched in bounded time. A file must not hang who loads it.

Python's matcher backtracks: `(a+)+b` tries every way to split a run of a's, 2^n for a name of n letters. How many ways
a pattern can match the beginnings of a name bounds its work, and is estimated from the pattern alone:

    literals, classes                    1
    X*  X+  X{m,n}  X?                   as many as X can be repeated, if X has one way; ways(X)^repetitions, if more
      a class before a letter it lacks   1: `\\d+\\.` and `(\\w+\\.)*` can only end in one place
      before two letters or more         8: few places of a name have them
    X|Y                                  1 for words of which none begins another, else the sum
    XY, lookaheads                       the product

A pattern of more ways than `LARGEST` is refused, and so are forms that module names have no use for and that hide
what a pattern is: verbose mode, conditionals, and characters by number. Running the match in a process with a time
limit was the alternative; it would judge by the model at hand, and by the load of the machine.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise


NAME_LENGTH = 50  # of a module: how often a repetition can be repeated
FEW = 8
LARGEST = 150_000  # about a millisecond for a name; three free wildcards side by side, or five before words
LONGEST = 100_000  # characters

_QUANTIFIER = re.compile(r"(?:[*+?]|\{\d*(?:,\d*)?\})[?+]?")
_GROUP = re.compile(r"\(\?(?:P<\w+>|P=\w+|#|<?[=!]|[:>]|[aiLmsux-]*[:)]|)")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


class SlowPatternError(ValueError):
    """The message is a reason, to be put into a sentence."""


@dataclass(frozen=True)
class _Node:
    """A part of a pattern: how many ways it can match, the least it has of literal text, and the text if that is all.

    `one` is the source of a part that is one character of a class.
    """

    ways: float
    least: int = 0
    text: str | None = None
    one: str | None = None


def check_quick(pattern: str) -> None:
    """Raise SlowPatternError if a pattern that `re` compiles could take long to match."""
    if len(pattern) > LONGEST:
        raise SlowPatternError(f"it is longer than {LONGEST:,} characters")
    node, _ = _alternatives(pattern, 0)
    if node.ways > LARGEST:
        raise SlowPatternError(
            "it could take very long to match: repetitions within a repetition, or too many wildcards in a row"
        )


def _alternatives(pattern: str, start: int) -> tuple[_Node, int]:
    """The alternatives from `start` to the end of their group, and where that is."""
    arms, position = [], start
    while True:
        arm, position = _sequence(pattern, position)
        arms.append(arm)
        if position >= len(pattern) or pattern[position] == ")":
            break
        position += 1  # |
    if len(arms) == 1:
        return arms[0], position
    words = [arm.text for arm in arms if arm.text is not None]
    ways = 1.0 if len(words) == len(arms) and _none_begins_another(words) else sum(arm.ways for arm in arms)
    return _Node(ways, min(arm.least for arm in arms)), position


def _none_begins_another(words: list[str]) -> bool:
    ordered = sorted(word.casefold() for word in words)
    return not any(after.startswith(word) for word, after in pairwise(ordered))


def _sequence(pattern: str, start: int) -> tuple[_Node, int]:
    parts: list[tuple[_Node, tuple[int, float]]] = []
    position = start
    while position < len(pattern) and pattern[position] not in "|)":
        node, position = _atom(pattern, position)
        found = _QUANTIFIER.match(pattern, position)
        repeated = _repetitions(found[0]) if found else None
        if found and repeated:
            position = found.end()
        parts.append((node, repeated or (1, 1)))
    ways, least, next_letter, next_least = 1.0, 0, "", 0
    for node, (fewest, most) in reversed(parts):
        ways *= _ways(node, fewest, most, next_letter, next_least)
        least += node.least * fewest
        must_come = fewest == most > 0
        next_letter = (node.text or "")[:1] if must_come else ""
        next_least = node.least + next_least if must_come and node.least else 0
    is_text = all(node.text is not None and repeated == (1, 1) for node, repeated in parts)
    return _Node(ways, least, "".join(node.text or "" for node, _ in parts) if is_text else None), position


def _ways(node: _Node, fewest: int, most: float, next_letter: str, next_least: int) -> float:
    """How many ways a repeated part has, before a letter ("": any) and so many letters that must come."""
    if most == fewest:
        return _power(node.ways, fewest)
    if node.ways > 1:
        return node.ways + 1 if most == 1 else _power(node.ways, most)
    if next_letter and node.one and not re.fullmatch(node.one, next_letter, re.IGNORECASE):
        return 1
    repetitions = min(most, NAME_LENGTH) - min(fewest, NAME_LENGTH) + 1
    return min(FEW, repetitions) if next_least > 1 else repetitions


def _power(ways: float, count: float) -> float:
    return 1 if ways == 1 else ways**count if count * math.log(ways) < 50 else math.inf


def _repetitions(quantifier: str) -> tuple[int, float] | None:
    """(fewest, most); None for braces that are none."""
    if quantifier[0] in "*+?":
        return {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}[quantifier[0]]
    fewest, comma, most = quantifier[1 : quantifier.index("}")].partition(",")
    if not (fewest or comma):
        return None
    return int(fewest or 0), int(most) if most else math.inf if comma else int(fewest)


def _atom(pattern: str, start: int) -> tuple[_Node, int]:
    """What a quantifier would repeat, and where it ends."""
    character = pattern[start]
    if character == "(":
        return _group(pattern, start)
    if character == "[":
        found = _CLASS.match(pattern, start)
        if found is None:
            raise SlowPatternError("its classes of characters cannot be told apart")
        return _Node(1, 0, None, found[0]), found.end()
    if character == "\\":
        escaped = pattern[start + 1]
        if escaped in "xuUN":
            raise SlowPatternError("it names characters by number")
        if escaped.isalnum():  # a class, an edge, or what a group has matched
            return _Node(1, 0, None, character + escaped if escaped in "dDwWsS" else None), start + 2
        return _Node(1, 1, escaped, character + escaped), start + 2
    if character in ".^$":
        return _Node(1, 0, None, character if character == "." else None), start + 1
    return _Node(1, 1, character, re.escape(character)), start + 1


def _group(pattern: str, start: int) -> tuple[_Node, int]:
    found = _GROUP.match(pattern, start)
    opening = found[0] if found else "("
    if opening == "(?":
        raise SlowPatternError("it is conditional")
    if opening == "(?#":
        return _Node(1, 0, ""), pattern.index(")", start) + 1
    flags = opening.strip("(?:)")
    if "x" in flags and not flags.startswith("P"):
        raise SlowPatternError("it is in verbose mode")
    if opening.endswith(")") or opening.startswith("(?P="):  # flags alone, or what a group has matched
        end = start + len(opening)
        return _Node(1), end if opening.endswith(")") else end + 1
    node, end = _alternatives(pattern, start + len(opening))
    looks = opening.endswith(("=", "!"))  # ahead or behind: of no width
    return (_Node(node.ways) if looks else node), end + 1
