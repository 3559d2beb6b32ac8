"""The demo's pairs. The tests read the text, and do not use the code that wrote it."""

from __future__ import annotations

import operator
import re
from collections import Counter

import pytest

from infopo_kernels.commands.demo.word_problems import SLIPS, Pair, word_problems

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (-?\d+)")
PAIRS = word_problems(400)

Equation = tuple[int, str, int, int]


def equations(text: str) -> list[Equation]:
    return [(int(a), sign, int(b), int(c)) for a, sign, b, c in EQUATION.findall(text)]


def stated_answer(text: str) -> int:
    found = re.search(r"The answer is (-?\d+)\.$", text)
    assert found, text
    return int(found.group(1))


def true_of(equation: Equation) -> bool:
    left, sign, right, result = equation
    return OPERATIONS[sign](left, right) == result


@pytest.mark.parametrize("pair", PAIRS[:100], ids=lambda pair: f"{pair.slip}-{pair.slip_step}")
def test_chosen_is_right_and_rejected_slips_once(pair: Pair) -> None:
    right, wrong = equations(pair.chosen), equations(pair.rejected)
    assert len(right) >= 2, "the problems take several steps"
    assert all(true_of(e) for e in right)
    assert stated_answer(pair.chosen) == right[-1][-1] == pair.answer
    assert stated_answer(pair.rejected) == wrong[-1][-1] == pair.wrong_answer != pair.answer
    assert len(wrong) == len(right)
    assert wrong[: pair.slip_step] == right[: pair.slip_step], "nothing differs before the slip"
    # After the slip every equation is true again, has the right operation, and uses the wrong number.
    for mine, theirs in zip(wrong[pair.slip_step + 1 :], right[pair.slip_step + 1 :], strict=True):
        assert true_of(mine)
        assert mine[1] == theirs[1]
    (left, sign, second, result), (true_left, true_sign, true_second, _) = wrong[pair.slip_step], right[pair.slip_step]
    if pair.slip == "result":
        assert (left, sign, second) == (true_left, true_sign, true_second)
        assert not true_of((left, sign, second, result))
    elif pair.slip == "operation":
        assert (left, second) == (true_left, true_second)
        assert sign != true_sign
    else:
        assert (sign, second) == (true_sign, true_second)
        assert left != true_left
    assert all(e[3] > 0 for e in right + wrong), "a negative count would give the slip away"


@pytest.mark.parametrize("pair", PAIRS[:100:7])
def test_numbers_come_from_the_question_or_an_earlier_step(pair: Pair) -> None:
    known = {int(n) for n in re.findall(r"\d+", pair.question)}
    for left, _, right, result in equations(pair.chosen):
        assert {left, right} <= known, pair
        known.add(result)


def test_same_seed_same_pairs_and_no_question_twice() -> None:
    assert word_problems(50, seed=3) == word_problems(50, seed=3)
    assert word_problems(50, seed=3) != word_problems(50, seed=4)
    assert word_problems(30, seed=3) == word_problems(50, seed=3)[:30]
    questions = [pair.question for pair in PAIRS]
    assert len(set(questions)) == len(questions), "held-out pairs would be seen in training"


def test_every_kind_of_slip_occurs_at_every_step() -> None:
    seen = Counter((pair.slip, pair.slip_step) for pair in PAIRS)
    assert {kind for kind, _ in seen} == set(SLIPS)
    assert all(seen[kind, step] >= 5 for kind in SLIPS for step in range(3))


def test_text_has_no_slot_left() -> None:
    assert not [pair for pair in PAIRS if re.search(r"[{}]", pair.question + pair.chosen + pair.rejected)]


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="`count` must not be negative, got -1"):
        word_problems(-1)
    assert word_problems(0) == []
