"""The notes task's template: strict (the default), as published (`compat`), and by a rubric of 0 to 12."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from smolmlx.evals.parsers import bullet_lines
from smolmlx.evals.text import lexical_diversity, rubric_tokens, specificity, word_count

HEADERS = ("Summary", "Key Points", "Limitation", "Follow-up Question")
NUM_BULLETS = 3
MAX_RUBRIC = 12

BOILERPLATE = (
    "this text discusses",
    "this paper presents a novel",
    "it is important to note",
    "plays a crucial role",
    "further research is needed",
    "more research is needed",
    "may not generalize to all",
    "how can this be improved",
    "what are the implications",
)
"""Phrases that fit any input, for the formulaic rate of this task."""

GENERIC_LIMITATIONS = frozenset(
    {"none", "none identified", "not identified", "no limitation", "no limitations", "n/a", "none mentioned"}
)

_NAMES = "|".join(map(re.escape, HEADERS))
_BY_LOWER = {name.lower(): name for name in HEADERS}
_LOOSE = re.IGNORECASE | re.MULTILINE | re.ASCII
_ANY_HEADER = re.compile(rf"^[ \t]*({_NAMES})[ \t]*:", _LOOSE)
_HEADER = {name: re.compile(rf"^[ \t]*{re.escape(name)}[ \t]*:", _LOOSE) for name in HEADERS}
_MENTION = {name: re.compile(rf"{re.escape(name)}[ \t]*:", _LOOSE) for name in HEADERS}
_COMPAT_BULLET = re.compile(r"^[-*][ \t]+[^ \t\n]", re.MULTILINE)
_STRICT_BULLET = re.compile(r"- +\S")
_TOLERANT = re.compile(
    rf"^[ \t]*(?:#{{1,6}}[ \t]*)?(?:\*\*[ \t]*)?(?P<colon>{_NAMES})[ \t]*(?:\*\*[ \t]*)?:(?:\*\*)?"
    rf"|^[ \t]*(?:#{{1,6}}[ \t]*(?:\*\*[ \t]*)?|\*\*[ \t]*)(?P<mark>{_NAMES})[ \t]*(?:\*\*[ \t]*)?$",
    _LOOSE,
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?:vs|cf|al|etc|figs?|eqs?|sec|no|vol|ch|pp|dr|mrs?|ms|prof|st|approx|resp|incl|excl|max|min|avg|est|(?:[a-z]\.)*[a-z])$",
    re.I,
)
# A closing quote or bracket belongs to the sentence it ends.
_SENTENCE_END = re.compile(r"[.!?]+(?P<close>[\"'”’)\]]*)(?P<gap>\s*)(?=(?P<next>\S))")


@dataclass(frozen=True, slots=True)
class Compliance:
    """Whether an output keeps to the template, and every rule it breaks."""

    passed: bool
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rubric:
    """Four dimensions of 0 to 3 each."""

    summary: int
    bullets: int
    limitation: int
    follow_up: int

    @property
    def total(self) -> int:
        """The sum, 0 to 12."""
        return self.summary + self.bullets + self.limitation + self.follow_up


@dataclass(frozen=True, slots=True)
class Content:
    """What an output is made of, whatever its reference says."""

    num_words: int
    lexical_diversity: float
    specificity: float
    section_words: tuple[int, int, int, int]
    """Words per section in the template's order."""
    words_per_point: float
    num_bullets: int
    is_question: bool
    """The follow-up section ends in a question mark."""


def strict_compliance(text: str) -> Compliance:
    """Check the four headers in order and once, nothing before them, no empty section, three bullets, one question.

    A header stands at the start of its line, spelled as in the template; its text may follow on that line or after it.
    """
    text = _newlines(text)
    found = list(_ANY_HEADER.finditer(text))
    problems = [*_header_problems(found), *_preamble_problems(text, found)]
    bodies = _bodies(text, [(_BY_LOWER[match[1].lower()], match) for match in found])
    problems += [f"{name}: the section is empty" for name in HEADERS if name in bodies and not _has_word(bodies[name])]
    if "Key Points" in bodies:
        problems += _point_problems(bodies["Key Points"])
    if "Follow-up Question" in bodies:
        problems += _question_problems(bodies["Follow-up Question"])
    return Compliance(not problems, tuple(problems))


def compat_compliance(text: str, version: Literal["compat", "compat_v1"] = "compat") -> Compliance:
    """Apply the published lenient rule, so that old figures can be compared.

    It does not see text after the question, empty sections, wrong order, duplicates or a preamble. In `compat_v1` the
    follow-up needs only its header.
    """
    text = _newlines(text)
    problems = [f"{name}: no header" for name in HEADERS if not _HEADER[name].search(text)]
    if version == "compat" and not follow_up_valid(text, compat=True):
        problems.append("Follow-up Question: its first line does not end in '?'")
    bullets = compat_bullets(text)
    if bullets != NUM_BULLETS:
        problems.append(f"Key Points: {bullets} bullets, {NUM_BULLETS} expected")
    return Compliance(not problems, tuple(problems))


def compat_bullets(text: str) -> int:
    """Count bullet lines between the first mention of `Key Points:` and the next of `Limitation:`, or the end."""
    text = _newlines(text)
    start = _MENTION["Key Points"].search(text)
    if start is None:
        return 0
    stop = _MENTION["Limitation"].search(text, start.end())
    return len(_COMPAT_BULLET.findall(text, start.end(), stop.start() if stop else len(text)))


def follow_up_valid(text: str, compat: bool = False) -> bool:
    """Say whether the follow-up is one question and nothing more; for `compat` its first line need only end in `?`."""
    text = _newlines(text)
    header = _HEADER["Follow-up Question"].search(text)
    if header is None:
        return False
    body = text[header.end() :].strip()
    return body.split("\n")[0].rstrip().endswith("?") if compat else not _question_problems(body)


def sections(text: str) -> dict[str, str]:
    """Return the text of each of the four sections ('' where missing), found by tolerant headers.

    A header may carry `#`s or `**`; so marked, and alone on its line, it needs no colon. The first duplicate counts.
    """
    text = _newlines(text)
    found = [(_BY_LOWER[(match["colon"] or match["mark"]).lower()], match) for match in _TOLERANT.finditer(text)]
    bodies = _bodies(text, found)
    return {name: bodies.get(name, "").strip() for name in HEADERS}


def rubric(text: str) -> Rubric:
    """Score the four sections 0 to 3 each for length and specificity."""
    parts = sections(text)
    return Rubric(
        summary=_summary_score(parts["Summary"]),
        bullets=_bullets_score(bullet_lines(parts["Key Points"])),
        limitation=_limitation_score(parts["Limitation"]),
        follow_up=_follow_up_score(parts["Follow-up Question"]),
    )


def content(text: str) -> Content:
    """Count the words, sections and bullets of an output."""
    parts = sections(text)
    points = bullet_lines(parts["Key Points"])
    summary, key_points, limitation, follow_up = (word_count(parts[name]) for name in HEADERS)
    return Content(
        num_words=len(rubric_tokens(text)),
        lexical_diversity=lexical_diversity(text),
        specificity=specificity(text),
        section_words=(summary, key_points, limitation, follow_up),
        words_per_point=_mean_words(points),
        num_bullets=len(points),
        is_question=parts["Follow-up Question"].endswith("?"),
    )


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _has_word(text: str) -> bool:
    return any(character.isalnum() for character in text)


def _bodies(text: str, found: Sequence[tuple[str, re.Match[str]]]) -> dict[str, str]:
    """Cut the text after each header up to the next; the first of each name gives that section."""
    bodies: dict[str, str] = {}
    stops = [match.start() for _, match in found[1:]] + [len(text)]
    for (name, match), stop in zip(found, stops, strict=False):
        bodies.setdefault(name, text[match.end() : stop])
    return bodies


def _header_problems(found: Sequence[re.Match[str]]) -> list[str]:
    names = [_BY_LOWER[match[1].lower()] for match in found]
    problems = [f"{name}: no header" for name in HEADERS if name not in names]
    problems += [f"{name}: {names.count(name)} headers" for name in HEADERS if names.count(name) > 1]
    problems += [
        f"{name}: the header must read '{name}:' at the start of its line, not {match[0]!r}"
        for name, match in zip(names, found, strict=True)
        if match[0] != f"{name}:"
    ]
    first = list(dict.fromkeys(names))
    if first != [name for name in HEADERS if name in first]:
        problems.append(f"headers out of order: {', '.join(first)}")
    return problems


def _preamble_problems(text: str, found: Sequence[re.Match[str]]) -> list[str]:
    before = text[: found[0].start()] if found else text
    return ["text before the first header"] if before.strip() else []


def _point_problems(body: str) -> list[str]:
    beside, *below = body.split("\n")
    lines = [line for line in below if line.strip()]
    bullets = sum(bool(_STRICT_BULLET.match(line)) and _has_word(line) for line in lines)
    problems = [] if bullets == NUM_BULLETS else [f"Key Points: {bullets} bullets, {NUM_BULLETS} expected"]
    if bullets != len(lines) or beside.strip():
        problems.append("Key Points: something other than '- ' bullets")
    return problems


def _question_problems(body: str) -> list[str]:
    body = body.strip()
    if not _has_word(body):
        return ["Follow-up Question: no question"]
    lines = [line for line in body.split("\n") if line.strip()]
    problems = [] if len(lines) == 1 else ["Follow-up Question: text after the first line"]
    if not body.endswith("?"):
        problems.append("Follow-up Question: does not end in '?'")
    if any(_has_second_sentence(line) for line in lines):
        problems.append("Follow-up Question: more than one sentence")
    return problems


def _has_second_sentence(line: str) -> bool:
    """Say whether a sentence ends before the line does; decimals, abbreviations and quoted questions do not end one."""
    return any(_ends_sentence(line, match) for match in _SENTENCE_END.finditer(line))


def _ends_sentence(line: str, match: re.Match[str]) -> bool:
    following = match["next"]
    if not match["gap"]:
        return line[match.start()] in "?!" and following.isupper()
    if match["close"] and following.islower():
        return False
    marks = line[match.start() : match.start("close")]
    if set(marks) == {"."}:
        trails_off = len(marks) > 1 and following.islower()
        # The longest abbreviation and the character before it fit in this; searching the whole line would be quadratic.
        before = line[max(0, match.start() - 12) : match.start()]
        return not trails_off and not _ABBREVIATION.search(before)
    return True


def _mean_words(points: Sequence[str]) -> float:
    return sum(map(word_count, points)) / len(points) if points else 0.0


def _level(value: float, thresholds: Iterable[float]) -> int:
    """Return how many of the ascending thresholds the value reaches."""
    return sum(value >= threshold for threshold in thresholds)


def _summary_score(text: str) -> int:
    level = _level(word_count(text), (8, 15))
    return 3 if level == 2 and specificity(text) >= 0.55 else level


def _bullets_score(points: Sequence[str]) -> int:
    return _level(_mean_words(points), (5, 10, 15))


def _limitation_score(text: str) -> int:
    words = word_count(text)
    if not words or text.strip(" \t\n-*.!").lower() in GENERIC_LIMITATIONS:
        return 0
    if words > 18 and specificity(text) >= 0.50:
        return 3
    return 1 if words < 8 else 2


def _follow_up_score(text: str) -> int:
    if not text:
        return 0
    if not text.endswith("?"):
        return 1
    return 3 if word_count(text) >= 8 else 2
