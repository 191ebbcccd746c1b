"""Patterns that would hang whoever loads them are refused; what people write is not, and what passes is quick."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_qlora.patterns import LONGEST, SlowPatternError, check_quick


EXPLODING = [
    r"(a+)+b",
    r"(a*)*b",
    r"(a|a)*b",
    r"(a|ab|b)*c",
    r"(.*)*x",
    r"(.*a){20}x",
    r"(\w+)*$",
    r"((ab)*)*c",
    r"(.|\w)*x",
    r"(\d+|\w+)+x",
    r"(\w*\w*)*z",
    r"(x+x+)+y",
    r"([a-z]+)*\.",
    r"(?i)([a-z]*A)*b",
    r"(?=(a+)+b)",
    r"(?!(a+)+b)a",
    r"(?P<run>a+)+b",
    r"(?:a?){30}a{30}",
    r"(a{0,50}){0,50}b",
    r"(?:.*layers.*)*q",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    r".*.*.*.*.*x",
    r"\w*\w*\w*\w*\w*!",
    r"([^E]+e)*([^E]+e)*([^E]+e)*Z",  # negated classes have both cases where case does not matter
    r"(?i:[^E]+e)*([^A]+a)*([^L]+l)*Z",
    r"((\w+)+)*x",
    r"(\.\w+\d*)*Z",
    r"(\.[a-z.]+)*Z",
]
HIDDEN = [r"(?x)( a + ) + b", r"(?ix: a)", r"(a)?(?(1)b|c)", r"\x61+", r"\u0061", r"\N{DIGIT ONE}"]
WRITTEN = [
    "q_proj",
    r".*proj",
    r".*\.(q_proj|v_proj)$",
    r"(.*)\.(q|v)_proj",
    r"layers\.0\.",
    r"layers.[0-9]+.mlp",
    r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    r"^model\.layers\.([0-9]|1[0-5])\..*attn.*proj$",
    r".*\.layers\.(0|1|2|3|10|11)\.(self_attn|mlp)\..*",
    r"^(?!.*vision).*(?:q_proj|k_proj).*$",
    r"(?i).*attn.*",
    r".*\d+.*",
    r"encoder.*layer.*(query|value)",
    r"(\w+\.)*q_proj",
    r"(?:[^.]+\.)+v_proj",
    r"((\w+)\.)+(q|v)_proj",
    r"^model(?:\.[a-z_]+)*\.layers\.\d+\.(?:[a-z_]+\.)*[a-z]_proj$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:qkv|c_attn|proj\d+|[a-z]+_proj).*?)",
    r"(?P<stack>encoder|decoder)\.block\.\d+\.(?P=stack)",
    r"a{2}b{1,3}c{,2}d{2,}",
    r"a{b",
    r"[]a]+b",
    r"(?#which)q_proj",
    # what Unsloth writes for models of images and text
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|"
    r"feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))",
    "|".join(rf"model\.layers\.{i}\.self_attn\.{name}" for i in range(80) for name in ("q_proj", "k_proj")),
]


@pytest.mark.parametrize("pattern", EXPLODING)
def test_a_pattern_that_can_explode_is_refused(pattern: str) -> None:
    re.compile(pattern)
    with pytest.raises(SlowPatternError, match="could take very long"):
        check_quick(pattern)


@pytest.mark.parametrize("pattern", HIDDEN)
def test_a_pattern_that_hides_what_it_is_is_refused(pattern: str) -> None:
    re.compile(pattern)
    with pytest.raises(SlowPatternError):
        check_quick(pattern)


def test_a_very_long_pattern_is_refused() -> None:
    check_quick("a" * LONGEST)
    with pytest.raises(SlowPatternError, match="longer than"):
        check_quick("a" * (LONGEST + 1))


@pytest.mark.parametrize("pattern", WRITTEN)
def test_a_pattern_that_people_write_is_not(pattern: str) -> None:
    re.compile(pattern)
    check_quick(pattern)


def test_patterns_are_judged_together() -> None:
    many = [rf".*.*.*Z{i}" for i in range(10_000)]
    check_quick(many[0])
    with pytest.raises(SlowPatternError, match="very long"):
        check_quick(*many)


def test_repetitions_of_any_size_are_judged_without_being_written_out() -> None:
    check_quick("a{1000000}" * 100)
    check_quick("(?:ab|c){1000000}")
    with pytest.raises(SlowPatternError):
        check_quick("(?:a|ab){1000000}")


_WORDS = st.sampled_from(
    ["a", "b", "ab", "aa", "aba", ".", r"\.", r"\w", r"\d", "[ab]", "[^b]", "[^B]", "[a-z]", "A", "q_proj"]
)
_REPEATED = st.sampled_from(["*", "+", "?", "{2,}", "{0,9}", "{3}", "*?", "+?", ""])


def _grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, _REPEATED).map(lambda t: f"({t[0]}){t[1]}"),
        st.tuples(_WORDS, _REPEATED).map("".join),
        st.tuples(inner, inner).map(lambda t: f"(?:{t[0]}|{t[1]})"),
        st.tuples(st.sampled_from(["(?=", "(?!"]), inner).map(lambda t: f"{t[0]}{t[1]})"),
        st.lists(inner, min_size=2, max_size=4).map("".join),
    )


NAMES = [
    "a" * 100,
    "ab" * 50,
    "AbAB" * 25,
    "aab" * 32 + "c",
    "a.b." * 25,
    ".a" * 50,
    "model.language_model.layers.10.encoder_attention.q_proj" + "a" * 45,
]


@given(st.recursive(_WORDS, _grow, max_leaves=8), st.sampled_from(["", "x"]), st.booleans())
@settings(max_examples=400, deadline=None)
def test_what_is_accepted_is_quick(body: str, end: str, ignore_case: bool) -> None:
    """As PEFT asks, on names that make it try. 23 ms was the longest of 130,000; an explosion takes hours."""
    pattern = body + end
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "possible nested set"
        compiled = re.compile(rf"(.*\.)?({pattern})$", re.IGNORECASE if ignore_case else 0)
    try:
        check_quick(pattern)
    except SlowPatternError:
        assume(False)
    for name in NAMES:
        start = time.perf_counter()
        compiled.match(name)
        assert time.perf_counter() - start < 2
