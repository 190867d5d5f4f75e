"""Dynamic prompts: which prompts a line gives, and that a seed always gives the same."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.errors import UserError
from library.generation.dynamic_prompts import escaped, expand, is_dynamic, variant_count


def one(line: str, seed: int = 0) -> str:
    ((prompt,),) = expand(line, [seed])
    return prompt


@pytest.mark.parametrize(
    "line, prompts",
    [
        ("a cat", ["a cat"]),
        ("{e$$a|b|c}", ["a", "b", "c"]),
        ("{e$$1-2$$a|b}", ["a", "b", "a, b"]),
        ("{E$$2-1$$a|b}", ["a", "b", "a, b"]),
        ("{e$$2$$ and $$a|b|c}", ["a and b", "a and c", "b and c"]),
        ("{e$$2$$$$a|b}", ["ab"]),
        ("{e$$0-9$$a|b}!", ["!", "a!", "b!", "a, b!"]),
        ("{e$$a|b} {e$$1|2}", ["a 1", "a 2", "b 1", "b 2"]),
        ("{e$$a|{e$$b|c}}", ["a", "b", "c"]),
        ("{e$$2$$+$$a|{e$$b|c}}", ["a+b", "a+c"]),
        ("{x{e$$a|b}}", ["xa", "xb"]),
        ("{a}", ["a"]),
        ("{{{a}}} b", ["a b"]),
        ("x{|}y", ["xy"]),
        ("{0$$a|b}", [""]),
        ("{5$$a}", ["a"]),
    ],
)
def test_prompts_without_chance(line, prompts):
    assert expand(line, [1]) == [prompts]
    assert variant_count(line) == len(prompts)


def test_enumeration_is_repeated_for_each_seed():
    assert expand("{e$$a|b|c}", [1, 2]) == [["a", "b", "c"]] * 2


@pytest.mark.parametrize("line", [r"\{a|b\}", "{}", "a { b", "a } b", "}{", "{a|b", r"a \} {} {b\{"])
def test_braces_that_mean_themselves(line):
    assert not is_dynamic(line)
    assert one(line) == line.replace("\\", "")


def test_braces_that_mean_themselves_beside_and_inside_groups():
    assert one(r"\{x\} {e$$\{a\}} } {") == "{x} {a} } {"


def test_a_seed_gives_the_same_prompt_alone_and_among_others():
    line = "{red|green|blue} {cat|dog}, {2$$ and $$hat|tie|scarf}"
    seeds = range(50)
    together = expand(line, seeds)
    assert together == [[one(line, seed)] for seed in seeds]
    assert len({prompt for (prompt,) in together}) > 15, "seeds differ"


def test_two_of_three_are_never_the_same():
    for seed in range(30):
        x, y = one("{2$$ and $$a|b|c}", seed).split(" and ")
        assert x != y and {x, y} <= {"a", "b", "c"}


def test_every_count_of_a_range_and_every_variant_comes():
    counts = {len(one("{1-3$$+$$a|b|c|d}", seed).split("+")) for seed in range(60)}
    assert counts == {1, 2, 3}
    assert {one("{a|b|c}", seed) for seed in range(60)} == {"a", "b", "c"}


def test_groups_are_replaced_from_right_to_left_by_one_generator():
    chance = random.Random(7)
    chosen = []
    for variants in (["3", "4", "5"], ["a", "b"]):
        chosen.append(", ".join(chance.sample(variants, chance.randint(1, 1))))
    assert one("{a|b} {3|4|5}", 7) == f"{chosen[1]} {chosen[0]}"


def test_inner_groups_choose_first_and_each_level_starts_anew():
    def choice(variants):
        chance = random.Random(11)
        return chance.sample(variants, chance.randint(1, 1))[0]

    inner = choice(["b", "c", "d"])
    assert one("{a|{b|c|d}|e}", 11) == choice(["a", inner, "e"])


def test_variants_of_one_seed_make_the_same_choices():
    (prompts,) = expand("{e$$a|b|c} {x|y|z}", [3])
    assert len({prompt.split()[1] for prompt in prompts}) == 1


def test_options_may_stand_in_groups():
    assert {one("cat --s {20|30}", seed) for seed in range(20)} == {"cat --s 20", "cat --s 30"}


@pytest.mark.parametrize("count", ["-", "1-2-3", "-2", "3-", "9999999999"])
def test_a_count_that_is_none(count):
    with pytest.raises(UserError, match=r'^p.txt, line 2: ".*\$\$" in braces must be a number or a range'):
        expand(f"{{{count}$$a|b}}", [1], "p.txt, line 2")


def test_lines_that_give_too_much():
    ten = "{e$$" + "|".join("abcdefghij") + "}"
    with pytest.raises(UserError, match="^p.txt, line 2: .* more than 100,000 prompts"):
        expand(ten * 6, [1], "p.txt, line 2")
    with pytest.raises(UserError, match="more than 100,000 prompts"):
        variant_count("{e$$0-40$$" + "|".join(map(str, range(40))) + "}")
    with pytest.raises(UserError, match="braces are nested"):
        expand("{" * 5000 + "}" * 5000, [1])


@given(st.text("{}|$-e12 a\\", max_size=30))
def test_any_line_is_read_or_refused_in_one_sentence(line):
    try:
        (prompts,) = expand(line, [5])
    except UserError as error:
        assert "in braces must be a number" in str(error)
    else:
        assert len(prompts) == variant_count(line)
        assert is_dynamic(line) or prompts == [line.replace("\\{", "{").replace("\\}", "}")]


@given(st.text("{}|$e a1", max_size=20))
def test_escaped_text_means_itself(text):
    assert one(escaped(text)) == text


def test_as_many_as_all_combinations():
    variants = "abcde"
    (prompts,) = expand("{e$$2-3$$" + "|".join(variants) + "}", [1])
    assert prompts == [", ".join(c) for n in (2, 3) for c in itertools.combinations(variants, n)]
