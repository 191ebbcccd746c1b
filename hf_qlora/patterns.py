"""Whether a regular expression for module names can be matched in bounded time. A file must not hang who loads it.

Python's matcher backtracks: `(a+)+b` tries every way to split a run of a's, 2^n for a name of n letters. How many ways
a pattern can match the beginnings of a name bounds its work, and is estimated from the pattern alone:

    literals, classes                    1
    X*  X+  X{m,n}  X?                   as many as X can be repeated, if X has one way; ways(X)^repetitions, if more
      a class before a letter it lacks   1: `\\d+\\.` and `(\\w+\\.)*` can only end in one place, in either case
      (\\.X)*  if X ends before a dot     as many as it can be repeated: only the last repetition has a choice
      before two letters or more         8: few places of a name have them
    X|Y                                  1 for words of which none begins another, else the sum
    XY, lookaheads                       the product

Patterns of more ways than `LARGEST` together are refused, and so are forms that module names have no use for and that
hide what a pattern is: verbose mode, conditionals, and characters by number. Running the match in a process with a
time limit was the alternative; it would judge by the model at hand, and by the load of the machine.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise


NAME_LENGTH = 100  # of a module: how often a repetition can be repeated
FEW = 8
LARGEST = 20_000_000  # a fraction of a second for a name, since few of them are tried; three free wildcards in a row
LONGEST = 100_000  # characters

_QUANTIFIER = re.compile(r"(?:[*+?]|\{\d*(?:,\d*)?\})[?+]?")
_GROUP = re.compile(r"\(\?(?:P<\w+>|P=\w+|#|<?[=!]|[:>]|[aiLmsux-]*[:)]|)")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


class SlowPatternError(ValueError):
    """The message is a reason, to be put into a sentence."""


@dataclass(frozen=True)
class _Node:
    """A part of a pattern: how many ways it can match, the least it has of literal text, and the text if that is all.

    `one` is the source of a part that is one character of a class; `run` what a group holds if that is one part;
    `again` how many ways it can match before another repetition of itself.
    """

    ways: float
    least: int = 0
    text: str | None = None
    one: str | None = None
    run: tuple[_Node, tuple[int, float]] | None = None
    again: float = math.inf


def check_quick(*patterns: str) -> None:
    """Raise SlowPatternError if patterns that `re` compiles could take long to match, all of them together."""
    ways = 0.0
    for pattern in patterns:
        if len(pattern) > LONGEST:
            raise SlowPatternError(f"it is longer than {LONGEST:,} characters")
        ways += _alternatives(pattern, 0)[0].ways
    if ways > LARGEST:
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
        parts.append(node.run if node.run and not repeated else (node, repeated or (1, 1)))
    ways, least = _product(parts, "")
    is_text = all(node.text is not None and repeated == (1, 1) for node, repeated in parts)
    first = (parts[0][0].text or "")[:1] if parts and parts[0][1] == (1, 1) else ""
    again = _product(parts, first)[0] if first else math.inf
    text = "".join(node.text or "" for node, _ in parts) if is_text else None
    return _Node(ways, least, text, run=parts[0] if len(parts) == 1 else None, again=again), position


def _product(parts: list[tuple[_Node, tuple[int, float]]], next_letter: str) -> tuple[float, int]:
    """How many ways parts in a row have before a letter ("": any), and the least literal text of theirs."""
    ways, least, next_least = 1.0, 0, 0
    for node, (fewest, most) in reversed(parts):
        ways *= _ways(node, fewest, most, next_letter, next_least)
        least += node.least * fewest
        must_come = fewest == most > 0
        next_letter = (node.text or "")[:1] if must_come else ""
        next_least = node.least + next_least if must_come and node.least else 0
    return ways, least


def _ways(node: _Node, fewest: int, most: float, next_letter: str, next_least: int) -> float:
    """How many ways a repeated part has, before a letter ("": any) and so many letters that must come."""
    if most == fewest:
        return _power(node.ways, fewest)
    repetitions = min(most, NAME_LENGTH) - min(fewest, NAME_LENGTH) + 1
    if node.ways > 1:
        if node.again == 1:
            return max(node.ways, repetitions)
        return node.ways + 1 if most == 1 else _power(node.ways, most)
    if next_letter and node.one and not _can_be(node.one, next_letter):
        return 1
    return min(FEW, repetitions) if next_least > 1 else repetitions


def _can_be(one: str, letter: str) -> bool:
    """Whether a class has a letter, in either case, where case matters or not: a negated one may in one of these."""
    return any(
        re.fullmatch(one, case, flags) for case in (letter.lower(), letter.upper()) for flags in (0, re.IGNORECASE)
    )


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
