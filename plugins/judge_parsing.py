"""Numbers, words and JSON in a judge's answer. Unambiguous ones are read; for all others the result is None.

Unambiguous: `7`, `7/10`, `7 out of 10`, `70%`, `Score: 7`, `**Rating:** 7/10`, an object in a ```json block.
Not: an answer that is cut off, two different numbers, a range, a number above its scale, a number in a sentence
without a label.
"""

from __future__ import annotations

import json
import re
from typing import Any

DENOMINATORS = (5, 10, 100)
"""`N/D` is read for these D. With another D it is more likely a date, a count or a cut-off number."""

_LABEL = r"\b(?:score|rating|grade|answer|verdict|result|points)\b"
_SCALE = r"(?:\((?P<scale>[^()\n]*)\)|(?:out of|of)[ \t]*(?P<top>[0-9]+))"
_NUMBER = r"(?P<number>[-\u2212]?[0-9]+(?:\.[0-9]+)?)"
_OVER = r"[ \t]*(?:(?P<percent>%)|\(?(?:/|out of|of)[ \t]*(?P<over>[0-9]+)\)?)"
_LABELLED = re.compile(
    rf"{_LABEL}[\"']?[ \t]*(?:{_SCALE}[ \t]*)?(?:[:=]|\bis\b)[ \t]*[\"']?{_NUMBER}(?:{_OVER})?", re.IGNORECASE
)
_FRACTION = re.compile(rf"{_NUMBER}{_OVER}", re.IGNORECASE)
_WHOLE = re.compile(rf"(?:{_LABEL}[ \t]*)?{_NUMBER}(?:{_OVER})?\.?", re.IGNORECASE)
_GOES_ON = re.compile(  # text behind a number that makes it another one, or one of several
    r"""
    [\w%\u00bd\u00bc\u00be]  # a word, a fraction
    | [.,:][0-9]
    | [ \t]* \(? (?: / | (?:out | of | out[ ]of) [ \t]* $ )  # a denominator that is cut off or not a number
    | [ \t]* (?: [-\u2013\u2014~,;] | to\b | or\b | and\b )? [ \t]* [0-9]  # a range, an alternative
    """,
    re.IGNORECASE | re.VERBOSE,
)
_STARS = re.compile(r"[ \t]*(?:stars?\b|\u2605)", re.IGNORECASE)
_COMES_FROM = re.compile(r"[\w.,/:\u2212-]$|[0-9][ \t]*(?:[-\u2013\u2014~]|to|or|and)[ \t]*$", re.IGNORECASE)
_WORD = re.compile(rf"(?:{_LABEL}[ \t]*[:=]?[ \t]*)?[\"']?(yes|no)[\"']?[.!]?", re.IGNORECASE)


def final_text(text: str) -> str | None:
    """The answer after a model's thoughts; None when the thoughts are cut off."""
    *thoughts, answer = re.split(r"</think(?:ing)?>", text, flags=re.IGNORECASE)
    if not thoughts and re.match(r"\s*<think(?:ing)?>", text, re.IGNORECASE):
        return None
    return answer.strip()


def only_object(text: str) -> dict[str, Any] | None:
    """The one JSON object in a text, with words or a code block around it and its keys in lower case.

    None without one, with two that differ, with a broken one and with one that has a key twice.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_without_repeats, parse_constant=_refuse)
    found: list[dict[str, Any]] = []
    at = text.find("{")
    while at >= 0:
        try:
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        found.append(row)
        at = text.find("{", end)
    return found[0] if found and all(row == found[0] for row in found) else None


def rating(text: str, top: int, *, cut: bool = False) -> float | None:
    """The one rating in an answer to "rate from 0 to `top`", as a share of its scale.

    Args:
        cut: the answer reached its limit of tokens, so a number at its end may lack digits.
    """
    answer = final_text(text)
    if answer is None:
        return None
    if "{" in answer:
        row = only_object(answer)
        named = [] if row is None else [v for k, v in row.items() if re.fullmatch(_LABEL, k)]
        return _of_value(named[0], top) if len(named) == 1 else None
    plain = _plain(answer)
    if (whole := _WHOLE.fullmatch(plain)) is not None:
        return None if cut else _share(whole, top)
    labelled = list(_LABELLED.finditer(plain))
    free = [m for m in _FRACTION.finditer(plain) if not any(a.start() < m.end() <= a.end() for a in labelled)]
    unclear = any(_COMES_FROM.search(plain[: m.start()]) for m in free)
    for m in (*labelled, *free):
        unclear |= _GOES_ON.match(plain, m.end()) is not None or (cut and m.end() == len(plain))
        unclear |= m["over"] is None and _STARS.match(plain, m.end()) is not None  # of how many?
    shares = {_share(m, top) for m in (*labelled, *free)}
    return shares.pop() if len(shares) == 1 and not unclear else None


def grade(value: Any, low: int, high: int) -> float | None:
    """A grade from `low` to `high` in a JSON object: a number, or a text such as "4" or "4/5"."""
    if isinstance(value, str):
        match = _WHOLE.fullmatch(_plain(value))
        if match is None or match["percent"] or _denominator(match, high) != high:
            return None
        value = float(match["number"].replace("\u2212", "-"))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if low <= value <= high else None


def yes_or_no(text: str) -> bool | None:
    """The answer to a yes-or-no question: that word alone, with or without a label, marks or JSON around it."""
    answer = final_text(text)
    if answer is None:
        return None
    if "{" in answer:
        row = only_object(answer) or {}
        named = [v for k, v in row.items() if re.fullmatch(_LABEL, k)]
        if len(named) != 1 or not isinstance(named[0], str | bool):
            return None
        if isinstance(named[0], bool):
            return named[0]
        answer = named[0]
    match = _WORD.fullmatch(_plain(answer))
    return None if match is None else match[1].lower() == "yes"


def _plain(text: str) -> str:
    """Text without Markdown's marks."""
    return re.sub(r"```\w*|\*|`|__|(?m:^#+)", "", text).replace("\uff1a", ":").strip()


def _of_value(value: Any, top: int) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    match = _WHOLE.fullmatch(_plain(str(value)))
    return None if match is None else _share(match, top)


def _share(match: re.Match[str], top: int) -> float | None:
    """A number over its denominator; None when it is negative, above it, or of another scale than 0 to it."""
    number, over = float(match["number"].replace("\u2212", "-")), _denominator(match, top)
    return number / over if over is not None and 0 <= number <= over else None


def _denominator(match: re.Match[str], top: int) -> int | None:
    """The top of the scale that a match states, else `top`; None for scales that are not understood."""
    groups = match.groupdict()
    stated = {int(groups[name]) for name in ("over", "top") if groups.get(name)}
    if groups.get("percent"):
        stated.add(100)
    if groups.get("scale"):
        ends = [int(n) for n in re.findall(r"[0-9]+", groups["scale"])]
        if not ends or (len(ends) > 1 and ends[0] != 0) or len(ends) > 2:
            return None
        stated.add(ends[-1])
    if len(stated) > 1 or not stated <= {top, *DENOMINATORS}:
        return None
    return stated.pop() if stated else top


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = {key.casefold(): value for key, value in pairs}
    if len(row) < len(pairs):
        raise ValueError("a key comes twice")
    return row


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
