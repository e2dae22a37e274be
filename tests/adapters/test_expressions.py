"""Expressions accept what Python's `re` accepts, and take bounded time."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.adapters.expressions import Expression, ExpressionError

ATOMS = (
    *("a", "b", ".", "[ab]", "[^a]", r"\d", r"\W", r"\b", "^", "$", "1", r"\.", "A", "[A-C]"),
    *("(?=a)", "(?!b)", "(?<=a)", "(?<!b)", "(?:a|b)", r"[\d_]", r"\Z", r"(?=.*1)", r"(?!.*\.)"),
)
patterns = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(
            inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,2}", "*?", "+?", "{2,}"])
        ).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(["", "(?i)"]), patterns, st.text("abA1.\n_", max_size=6))
def test_an_expression_accepts_what_re_accepts(flags: str, pattern: str, text: str) -> None:
    accepted = re.fullmatch(flags + pattern, text) is not None
    assert Expression(flags + pattern).matches(text) == accepted


@settings(deadline=None, max_examples=300)
@given(patterns, st.text("ab1._", max_size=6))
def test_an_expression_after_a_dot_is_that_of_peft(pattern: str, text: str) -> None:
    starts = [0, *(at + 1 for at in range(len(text)) if text[at] == ".")]
    accepted = re.match(rf"(.*\.)?({pattern})$", text) is not None
    assert Expression(pattern).matches(text, starts) == accepted


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|v_proj|gate_proj)))"
)
SWIFT = r"^(model\.language_model(?=\.).*\.(q_proj|v_proj|o_proj))$"
NO_VISION = r"^(?!.*vision).*(?:q_proj|v_proj)$"


@pytest.mark.parametrize("pattern", [UNSLOTH, SWIFT, NO_VISION])
@pytest.mark.parametrize(
    "path",
    [
        "model.layers.31.self_attn.q_proj",
        "model.language_model.layers.0.self_attn.v_proj",
        "model.vision_tower.layers.3.self_attn.q_proj",
        "model.layers.7.mlp.down_proj",
    ],
)
def test_expressions_of_other_programs(pattern: str, path: str) -> None:
    assert Expression(pattern).matches(path) == (re.fullmatch(pattern, path) is not None)


CATASTROPHIC = [
    *("(a+)+$", "(a|a)*$", "(a|aa)+$", "(a*)*$", "(.*)*x", "(.*a){20}x", "(?:a?){60}a{60}x"),
    *(r"(\w+\s?)*!", "((a{0,100}){0,100}){0,100}x", "(((a{1000}){1000}){1000}){1000}x"),
    *("(.*.*.*.*.*)*x", "(?:(?=(.*)*y)|a)*x"),
]


@pytest.mark.parametrize("pattern", CATASTROPHIC)
def test_an_expression_with_very_many_ways_is_matched(pattern: str) -> None:
    """Python's `re` needs years for most of these."""
    assert not Expression(pattern).matches("a" * 100 + "!!")


def test_work_is_limited() -> None:
    with pytest.raises(ExpressionError, match="takes too long"):
        Expression("(?:.*(?=.*(?=.*(?=.*b)))a)*x").matches("a" * 300)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a", "is not a regular expression"),
        ("(" * 2000 + "a" + ")" * 2000, "is not a regular expression"),
        ("(?:" * 60 + "a" + ")*" * 60, "nested too deeply"),
        (r"(a)\1", "groupref is not supported"),
        ("(a)?(?(1)b|c)", "groupref_exists is not supported"),
        ("(?>a+)b", "atomic_group is not supported"),
        ("a++b", "possessive_repeat is not supported"),
        ("(?s).", "flags"),
        ("(?i:a)", "flags"),
        ("a" * 5001, "5,001 characters"),
        ("a{99999999999999999999}", "is not a regular expression"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_supported_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        Expression(pattern)
