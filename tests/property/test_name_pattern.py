"""Patterns of module names against Python's ``re``, which defines what they mean."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_lora.errors import AdapterFileError
from edge_lora.interop.name_pattern import Budget, Pattern, PatternTable

atoms = st.sampled_from(
    ["a", "b", "1", r"\.", ".", r"\d", r"\w", "[ab]", "[^a.]", "[0-9b]", "{", "-"]
)
nested = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda p: f"({'|'.join(p)})"),
        st.tuples(
            inner.map("(?:{})".format),
            st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,}", "{,2}", "{,}", "{0,1}?"]),
        ).map("".join),
    ),
    max_leaves=8,
)
anchored = st.tuples(st.sampled_from(["", "^"]), nested, st.sampled_from(["", "$"])).map("".join)
patterns = anchored | st.lists(anchored, min_size=2, max_size=3).map("|".join)
module_names = st.text("ab1.-{", max_size=8)


@given(patterns, module_names)
def test_it_matches_what_re_matches(pattern, name):
    found = Pattern(pattern, Budget()).fullmatch(name)
    assert found == (re.fullmatch(pattern, name) is not None)


plain = st.lists(
    st.sampled_from(["a", "b", "1", ".", "-", r"\.", r"\-"]), min_size=1, max_size=6
).map("".join)
names_or_more = plain | plain.map("^{}".format) | patterns


@given(st.lists(names_or_more, max_size=6, unique=True), st.lists(module_names, max_size=6))
def test_the_first_pattern_that_matches_the_end_of_a_name_counts(keys, names):
    table = PatternTable({key: number for number, key in enumerate(keys)}, "p", Budget())
    for name in names:
        matching = (n for n, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", name))
        assert table.get(name, -1) == next(matching, -1)


def test_what_people_write():
    names = [
        f"model.layers.{layer}.{part}"
        for layer in range(30)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    for pattern in (
        r".*\.layers\.\d+\.mlp\..*_proj",
        r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k)_proj",
        r".*\.(1[0-9]|2[0-3])\..*(q|v)_proj",
        r"(?:.*layers)+.*",
        r"^model\.layers\.(?P<n>[12]?\d)\.self_attn\.[qk]_proj$",
    ):
        regex = Pattern(pattern, Budget())
        hits = [name for name in names if regex.fullmatch(name)]
        assert hits == [name for name in names if re.fullmatch(pattern, name)]
        assert 0 < len(hits) <= len(names)


def test_a_name_for_each_of_many_modules_is_looked_up():
    names = [f"model.layers.{n}.experts.{m}.up_proj" for n in range(60) for m in range(100)]
    steps = 400 * len(names)  # each name against each other would take a thousand times that
    table = PatternTable({name: name for name in names}, "rank_pattern", Budget(steps))
    assert all(table.get(name, None) == name for name in names)
    assert table.get("model.layers.60.experts.0.up_proj", None) is None


@pytest.mark.parametrize("pattern", ["(?i)a", r"\bq", "a++", "(?:a", "a)", "[a", "+", "a{3,2}"])
def test_what_is_not_understood_is_refused(pattern):
    with pytest.raises(AdapterFileError, match="config: pattern"):
        Pattern(pattern, Budget())
