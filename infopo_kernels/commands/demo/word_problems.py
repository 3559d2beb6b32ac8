"""Preference pairs for the demo: multi-step arithmetic word problems, written by a seeded generator.

A story has a question with slots, steps that each apply one operation to given numbers or earlier results, and a
sentence for each step. The chosen response works every step out rightly. The rejected one makes one plausible slip at
one step (a wrong result, a wrong operation, or a number misread) and carries it through to a wrong answer.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

SYSTEM_PROMPT: Final = "Solve step by step."
"""Takes the place of the chat template's own, which is longer than a question."""

Conversation: TypeAlias = list[dict[str, str]]

_OPERATIONS: Final[dict[str, Callable[[int, int], int]]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_MISTAKEN_FOR: Final = {"+": "-", "-": "+", "*": "+"}
SLIPS: Final = ("result", "operation", "number")


@dataclass(frozen=True)
class Step:
    """``name = left operation right``; operands are slots of the story or names of earlier steps."""

    name: str
    left: str
    operation: str
    right: str
    sentence: str
    """Its wording; ``{work}`` becomes the equation."""


@dataclass(frozen=True)
class Story:
    """A family of problems that differ in their numbers, names and things."""

    question: str
    ranges: dict[str, tuple[int, int]]
    """Inclusive range of each number."""
    steps: tuple[Step, ...]
    """The last one's result is the answer."""


@dataclass(frozen=True)
class Pair:
    """A question with a right and a wrong way to answer it."""

    question: str
    chosen: str
    rejected: str
    answer: int
    wrong_answer: int
    slip: str
    """One of `SLIPS`."""
    slip_step: int
    """Index of the step at which the slip is made."""

    def row(self) -> dict[str, Conversation]:
        """The pair in TRL's conversational preference format."""
        return {
            "prompt": [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": self.question},
            ],
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
        }


_NAMES: Final = ("Ana", "Ben", "Chloe", "Dan", "Emma", "Finn", "Grace", "Hugo", "Iris", "Jack", "Kate", "Leo", "Maya")
_THINGS: Final = ("pens", "apples", "cards", "shells", "coins", "books", "eggs", "stamps", "beads", "nuts")

_STORIES: Final = (
    Story(
        "{who} buys {a} boxes of {b} {things} and gives {c} away. How many {things} are left?",
        {"a": (3, 9), "b": (6, 19), "c": (4, 15)},
        (
            Step("all", "a", "*", "b", "The boxes hold {work} {things}."),
            Step("left", "all", "-", "c", "Without those given away, {work} are left."),
        ),
    ),
    Story(
        "{who} has {a} {things} and finds {b} more. Each sells for {c} dollars. What do they all sell for?",
        {"a": (8, 25), "b": (5, 19), "c": (3, 9)},
        (
            Step("all", "a", "+", "b", "There are {work} {things}."),
            Step("price", "all", "*", "c", "They sell for {work} dollars."),
        ),
    ),
    Story(
        "A bus with {a} riders lets {b} off and takes {c} on. A ticket is {d} dollars. What did those on board pay?",
        {"a": (20, 40), "b": (4, 15), "c": (3, 12), "d": (2, 5)},
        (
            Step("stay", "a", "-", "b", "{work} stay."),
            Step("aboard", "stay", "+", "c", "Then {work} are on board."),
            Step("paid", "aboard", "*", "d", "They paid {work} dollars."),
        ),
    ),
    Story(
        "{who} reads {a} pages a day for {b} days. The book has {c} pages. How many are left?",
        {"a": (11, 24), "b": (3, 8), "c": (210, 290)},
        (
            Step("read", "a", "*", "b", "{who} reads {work} pages."),
            Step("left", "c", "-", "read", "So {work} pages are left."),
        ),
    ),
    Story(
        "{who} has {a} bags of {b} {things} and {c} bags of {d}. How many {things} are there?",
        {"a": (2, 6), "b": (7, 15), "c": (2, 5), "d": (12, 19)},
        (
            Step("first", "a", "*", "b", "The first bags hold {work}."),
            Step("second", "c", "*", "d", "The others hold {work}."),
            Step("all", "first", "+", "second", "Together they hold {work} {things}."),
        ),
    ),
    Story(
        "{who} works {a} hours at {b} dollars an hour, and spends {c} dollars. How many dollars remain?",
        {"a": (4, 9), "b": (12, 19), "c": (15, 40)},
        (
            Step("earned", "a", "*", "b", "{who} earns {work} dollars."),
            Step("left", "earned", "-", "c", "After spending, {work} dollars remain."),
        ),
    ),
    Story(
        "A hall has {a} rows of {b} seats. {c} seats are taken, then {d} more. How many are free?",
        {"a": (6, 9), "b": (12, 19), "c": (21, 38), "d": (11, 29)},
        (
            Step("seats", "a", "*", "b", "The hall has {work} seats."),
            Step("taken", "c", "+", "d", "Of these, {work} are taken."),
            Step("free", "seats", "-", "taken", "So {work} are free."),
        ),
    ),
    Story(
        "{who} saves {a} dollars a week for {b} weeks and gets {c} dollars more. A bike is {d}. What is missing?",
        {"a": (12, 19), "b": (5, 9), "c": (10, 25), "d": (210, 260)},
        (
            Step("saved", "a", "*", "b", "{who} saves {work} dollars."),
            Step("has", "saved", "+", "c", "With the rest that is {work} dollars."),
            Step("missing", "d", "-", "has", "So {work} dollars are missing."),
        ),
    ),
)


def _slipped_result(rng: random.Random, step: Step, left: int, right: int, result: int) -> int:
    """A neighbour in the times table, a forgotten carry, or a miscount by one."""
    candidates = [result - 10, result + 10, result - 1, result + 1]
    if step.operation == "*":
        candidates += [result - left, result + left, result + right]
    return rng.choice(candidates)


def _misread(rng: random.Random, number: int) -> int:
    """Its last two digits swapped where that changes it, else one more or one less."""
    text = str(number)
    swapped = int(text[:-2] + text[-1] + text[-2]) if len(text) > 1 else number
    return swapped if swapped != number and swapped > 9 else number + rng.choice((-1, 1))


def _respond(
    story: Story, slots: dict[str, str], numbers: dict[str, int], slip: tuple[int, str, random.Random] | None
) -> tuple[str, int, bool]:
    """The response, its answer, and whether every result on the way is positive."""
    values = dict(numbers)
    sentences = []
    plausible = True
    for index, step in enumerate(story.steps):
        left, right, sign = values[step.left], values[step.right], step.operation
        here = slip is not None and slip[0] == index
        if slip is not None and here and slip[1] == "number":
            left = _misread(slip[2], left)
        if slip is not None and here and slip[1] == "operation":
            sign = _MISTAKEN_FOR[sign]
        result = _OPERATIONS[sign](left, right)
        if slip is not None and here and slip[1] == "result":
            result = _slipped_result(slip[2], step, left, right, result)
        values[step.name] = result
        plausible = plausible and result > 0
        sentences.append(step.sentence.format(work=f"{left} {sign} {right} = {result}", **slots))
    answer = values[story.steps[-1].name]
    return " ".join([*sentences, f"The answer is {answer}."]), answer, plausible


def _draw(rng: random.Random) -> Pair:
    while True:
        story = rng.choice(_STORIES)
        numbers = {slot: rng.randint(low, high) for slot, (low, high) in story.ranges.items()}
        slots = {"who": rng.choice(_NAMES), "things": rng.choice(_THINGS)}
        chosen, answer, plausible = _respond(story, slots, numbers, None)
        kind, at = rng.choice(SLIPS), rng.randrange(len(story.steps))
        rejected, wrong_answer, also_plausible = _respond(story, slots, numbers, (at, kind, rng))
        # A negative number of seats gives a slip away; one that cancels out is none.
        if plausible and also_plausible and wrong_answer != answer:
            question = story.question.format(**slots, **numbers)
            return Pair(question, chosen, rejected, answer, wrong_answer, kind, at)


def word_problems(count: int, seed: int = 0) -> list[Pair]:
    """`count` pairs, no question twice; the same for the same seed on every machine.

    Raises:
        ValueError: `count` is negative.
    """
    if count < 0:
        raise ValueError(f"`count` must not be negative, got {count}.")
    rng = random.Random(seed)
    pairs: dict[str, Pair] = {}
    while len(pairs) < count:
        pair = _draw(rng)
        pairs.setdefault(pair.question, pair)
    return list(pairs.values())
