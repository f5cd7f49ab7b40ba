"""What a judge's answer says: clear answers in any dress are read, all others are no opinion and never a number."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from unigrpo_plugins.judge_client import Answer
from unigrpo_plugins.judge_modes import Rating, Rubric, YesNoOdds, YesNoWord, axes_of


def _object(alignment: Any = 4, quality: Any = 2) -> str:
    return json.dumps({"reason": "small", "alignment": alignment, "quality": quality})


MEAN = (2 * 0.75 + 0.25) / 3  # of grades 4 and 2, weights 2 and 1
# fmt: off
RUBRICS = {
    MEAN: [
        _object(), f"```json\n{_object()}\n```", f"```\n{_object()}\n```\n", f"Sure! {_object()}",
        f"Here it is:\n\n```JSON\n{_object()}\n```\nIt is small.", f"<think>{_object(1, 1)}?</think>{_object()}",
        f"{_object()}\n{_object()}", '{"Reason": "", "Alignment": 4, "QUALITY": 2}', _object(4.0, "2"),
        _object("4/5", "2 out of 5"),
    ],
    1.0: [_object(5, 5)],
    0.0: [_object(1, 1)],
    (2 * 0.875 + 0.25) / 3: [_object(4.5)],
    math.nan: [
        "", "[4, 2]", "4, 2", '{"reason": "it go', f"```json\n{_object()[:-9]}", f"{_object()[:-1]}\n```",
        f"<think>{_object()}", '{"alignment": 4}', '{"alignment": 4, "alignment": 3, "quality": 2}',
        '{"alignment": NaN, "quality": 2}', f"{_object()} or {_object(3)}", _object(6), _object(0), _object(True),
        _object("8/10"), _object("4 or 5"), _object(None), _object([4]),
    ],
}
RATINGS = {
    0.7: [
        "7", " 7\n", "7.", "7.0", "**7**", "`7`", "# 7", "```\n7\n```", "7/10", "7 / 10", "7 out of 10", "(7/10)",
        "70%", "Score: 7", "score=7", "**Score:** 7", "**Score: 7**", "Score: 7/10", "Rating: 7 out of 10",
        "Score: 70/100", "Rating: 7 (out of 10)", "Final score: 7.", "The score is 7.", "Score 7", "Score (0-10): 7",
        "Score out of 10: 7", "Score\uff1a7", "I give it 7/10 because it is red.", "Score: 7\n\nTwo of 3 dogs are red.",
        "7/10\nScore: 7", '{"score": 7}', '{"rating": "7/10", "reason": "3 dogs"}', '```json\n{"Score": 7}\n```',
        "<think>3/10?</think>7",
    ],
    0.8: ["4/5", "Score: 4 (out of 5)", "Rating: 4/5 stars", "Score (0-5): 4"],
    0.75: ["7.5", "7.5/10"],
    1.0: ["10", "10/10", "5/5", "100%"],
    0.0: ["0", "0/10"],
    math.nan: [
        "", "seven", "\u0667", "I would say 7", "7 dogs", "7 or 8", "7-8", "7 8", "7\n8", "11", "-3", "1e1", "7\u00bd",
        "7/10 or 8/10", "7/10, 3/10", "between 6 and 8/10", "6-8/10", "12/10", "10/5", "150%", "7,5", "7,5/10", "7/",
        "7/1", "7 out of", "3/4", "7/1000", "7/10/2024", "1/10.5", "4 stars", "Score: 4 stars", "Score: 11",
        "Score: -3", "Score: 10.5", "Score: 6-7", "Score: 7 or 8", "Score: 7\nScore: 8", "Score: 7,5", "Score: seven",
        "Score: 7 (8/10 for colour)", "Score (1-5): 4", "Score (1-10): 7", "Score out of 7: 6", '{"score": 7',
        '{"score": 7, "rating": 8}', '{"score": true}', '{"score": [7]}', "<think>7", "<think>7/10",
    ],
}
WORDS = {
    1.0: ["Yes", "yes.", "**Yes**", "Answer: yes", "```\nYES\n```", '{"answer": "yes"}', "<think>no?</think> Yes!"],
    0.0: [" no.", "No", "**Answer:** No", '{"answer": false}'],
    math.nan: [
        "", "not", "yes, it does", "yes and no", "yes no", "<think>yes", '{"answer": 1}', '{"answer": "yes"',
    ],
}
# fmt: on
TABLES = ((Rubric(axes_of("alignment:2 quality")), RUBRICS), (Rating(), RATINGS), (YesNoWord(), WORDS))


@pytest.mark.parametrize(
    ("form", "text", "value"),
    [(form, text, value) for form, table in TABLES for value, texts in table.items() for text in texts],
)
def test_answers(form: Any, text: str, value: float) -> None:
    reading = form.read(Answer(text))
    assert reading.value == pytest.approx(value, nan_ok=True)
    assert bool(reading.why) == math.isnan(value)


def test_a_rubric_gives_its_reason_and_a_part_for_each_axis() -> None:
    reading = Rubric(axes_of("alignment:2 quality")).read(Answer(_object()))
    assert (reading.remark, reading.parts) == ("small", {"alignment": 0.75, "quality": 0.25})


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", math.nan), ("Score: 7", math.nan), ("Score: 7/1", math.nan), ("7/10", math.nan), ("Score: 7\nThe dog", 0.7)],
)
def test_a_number_at_the_limit_of_tokens_may_lack_digits(text: str, value: float) -> None:
    assert Rating().read(Answer(text, finish="length")).value == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize(
    ("first", "value", "mass"),
    [
        ({"Yes": 0.5, " yes": 0.1, "YES": 0.1, "No": 0.2, "\u2581no": 0.05, "Maybe": 0.02}, 0.7 / 0.95, 0.95),
        ({"\u0120Yes": 0.25, "\u0120no": 0.25}, 0.5, 0.5),
        ({"no": 0.9}, 0.0, 0.9),
        ({"Yes": 0.9, "Yesterday": 0.05, "Not": 0.04}, 1.0, 0.9),
        ({"Yes": 0.06, "No": 0.02}, 0.75, 0.08),
        # A model about to think has yes among its first tokens by chance.
        ({"<think>": 0.99, "Yes": 1e-7}, math.nan, math.nan),
        ({"The": 0.9, "yesterday": 0.1}, math.nan, math.nan),
        ({}, math.nan, math.nan),
    ],
)
def test_odds_of_yes(first: dict[str, float], value: float, mass: float) -> None:
    reading = YesNoOdds().read(Answer("", tuple((t, math.log(p)) for t, p in first.items())))
    assert reading.value == pytest.approx(value, abs=1e-12, nan_ok=True)
    assert reading.parts.get("mass", math.nan) == pytest.approx(mass, abs=1e-12, nan_ok=True)
    assert bool(reading.why) == math.isnan(value)
