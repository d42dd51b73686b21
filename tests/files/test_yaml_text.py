"""YAML that nobody vouches for: values as JSON has them, everything else refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.files.yaml_text import parse_yaml, yaml_text

TEXTS = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\u2028\u2029\ufeff\ufffe\uffff"))
NUMBERS = st.one_of(st.integers(-(10**30), 10**30), st.floats(allow_nan=False, allow_infinity=False))
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES: st.SearchStrategy[Any] = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12
)


@given(VALUES)
def test_what_is_written_is_read(value: object) -> None:
    assert parse_yaml(yaml_text(value)) == value


def test_keys_stay_in_order_and_are_texts() -> None:
    assert list(parse_yaml("b: 1\na: 2\n3: x\nyes: y")) == ["b", "a", "3", "yes"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x 1", "line 1: anchors and aliases"),
        ("a: 1\nb: *x", "line 2: anchors and aliases"),
        ("a: !!python/name:os.system", "line 1: the tag"),
        ("- !!str 5", "line 1: the tag"),
        ("- !mine {a: 1}", "line 1: the tag"),
        ("a: 2020-01-01", "'2020-01-01' is no text"),
        ("<<: {a: 1}", "'<<' is no text"),
        ("a: 1\nb: {c: 1, c: 2}", "line 2: the key 'c' stands twice"),
        ("? [1]\n: 2", "a key is no text"),
        *((f"a: {text}", "a number in YAML's own way") for text in ("1:30", "010", "1_000", "0x1f", "1:30.5")),
        ("a: .inf", "out of range"),
        ("a: [.nan]", "out of range"),
        ("[" * 65 + "]" * 65, "nested too deep"),
        ("{a: " * 2000, "nested too deep"),
        ("a: [1", "line 1: "),
        ("--- 1\n--- 2", "line 2: "),
        ("a: '\x00'", "special characters"),
        ("@", "line 1: "),
    ],
)
def test_everything_else_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_yaml(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_aliases_that_multiply_are_refused_at_once() -> None:
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
    with pytest.raises(ValueError, match="line 1: anchors and aliases"):
        parse_yaml("\n".join(lines))
