"""Chat views that write a passage under headings: the form of notes, on documentation."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from smolmlx.data.corpus_pages import Passage
from smolmlx.data.corpus_sentences import NUMBERS, RESTRICTION, ask_about, bullets, shorten, subject_of, terms_of

Made = tuple[str, Mapping[str, str]] | None
"""An answer and what its instruction's wording names (`text`: in place of the passage's), or None where it does not apply."""

_HEADINGS = {
    "first": ("Opening", "Start", "Topic", "Gist"),
    "points": ("Points", "Facts", "Details", "Main Facts"),
    "restriction": ("Caution", "Restriction", "Exception", "Known Gap"),
    "terms": ("Terms", "Names", "Vocabulary"),
    "last": ("Closing", "End", "Outcome"),
    "question": ("Question", "Open Question", "Ask", "Reader Question"),
}
_USUAL = 0.6
"""Chance of the first of a section's headings, and of the sections' usual order."""
_MADE_UP = 0.25
"""Chance of a heading put together from the words below, so that headings are read and not remembered."""
_HEADING_STARTS = (
    *("Main", "Short", "Hidden", "Early", "Safe", "Quiet", "Basic", "Known", "Broad", "Plain", "Second", "Final"),
    *("Core", "Weak", "Strong", "Rare", "Useful", "Local", "Daily", "Written"),
)
_HEADING_ENDS = (
    *("Idea", "Claim", "Matter", "Caveat", "Ground", "Lesson", "Record", "Remark", "Position", "Condition"),
    *("Observation", "Step", "Expectation", "Instruction", "Requirement", "Implication", "Evaluation"),
    *("Specification", "Consideration", "Definition"),
)
_LEADS = (
    *("First of all, ", "Note: ", "The point is that ", "Background: ", "Bear in mind that ", "Here is why: "),
    *("Detail: ", "It helps to know that ", "To be precise, ", "Also, ", "Consequence: "),
    *("Somebody asked about it: ", "Besides, "),
)
_LABELS = (
    *("Finding", "Reason", "Scope", "Answer", "Result", "Remark", "Given", "Idea", "Open", "Status", "Claim"),
    *("Context", "Observed", "Plan", "Rule", "Effect", "Source", "Cause", "Item", "Summary of the day"),
    *("What we saw", "For whom"),
)
_OPENINGS = (
    *("About {x}.", "This page is on {x}.", "The text below explains {x}.", "Topic of the week: {x}."),
    *("A word on {x}.", "Somebody wanted to know more of {x}.", "Entry: {x}"),
    *("Yesterday the talk was of {x}.", "Part two, {x}."),
)
_GREETINGS = (
    *("Hello {who},", "Dear all,", "Entry number {n}.", "To {who}, with thanks."),
    *("For {who}, version {n}.", "Page {n}."),
)
_CLOSINGS = (
    *("Thanks, {who}", "Last edited by {who}.", "End of entry {n}.", "See you, {who}"),
    *("Kept by {who} since year {n}.", "More on page {n}.", "{who} will look at it again."),
    *("Approved by {who}.", "Copied from page {n}."),
)
_PEOPLE = ("Anna", "Karl", "Mina", "Oskar", "Lucia", "Yusuf", "Grace", "Viktor", "Amara", "Jonas", "Keiko", "Pedro")
_WONDERS = (
    "What happens to {x} when {y} changes?",
    "Does {x} still hold without {y}?",
    "How does {x} affect {y}?",
    "Can {x} be replaced by {y}?",
    "How should {x} be chosen so that {y} does not depend on {z}?",
    "Can {x} be computed before {y} without giving up {z}?",
    "Which part of {x} could be left out without harming {y} or {z}?",
    "From which size of {x} on does {y} cost more than {z}?",
    "Would a second {x} improve {y} where {z} is already in use?",
    "Does {x} still help {y} once {z} has been set by hand?",
    "How far can {x} be reduced before {y} and {z} disagree?",
    "What happens to {y} in practice if {x} is missing and {z} is large?",
    "Could {x} be learned from {y} instead of being taken from {z}?",
    "How much does {y} change when {x} is replaced by {z} at the end?",
    "How many kinds of {x} does {y} need before {z} stops changing?",
    "How can {x} be measured when {y} is unknown and {z} is rare?",
    "Is there a value of {x} for which {y} no longer affects {z}?",
    "Who should decide whether {x} or {y} is used to describe {z}?",
    "When does it pay to give {x} its own {y} rather than sharing {z}?",
    "Should {x} be checked after every {y}, or only once {z} is known?",
    "Why would anyone prefer {x} to {y} if {z} comes for free?",
    "Which {x} works best with {y} when {z} is short?",
)
_ASKED_OF_SUBJECTS = (
    *("What would break without {x}?", "Who decides on {x}?", "Where else is {x} used?", "How is {x} tested?"),
    *("Could {x} be removed?", "When was {x} added?", "What do users expect from {x}?"),
    *("Which errors come from {x}?", "What is missing in {x}?", "How does one turn off {x}?"),
    *("Why is {x} needed here?", "Does {x} depend on anything else?", "How much memory does {x} take?"),
    *("Which tool replaces {x}?", "Was {x} always like this?", "What comes before {x}?"),
    *("Is it safe to change {x}?", "Who pays for {x}?", "How do others name {x}?", "Where can we read about {x}?"),
    *("Has anyone measured {x}?", "Does it matter who wrote {x}?"),
)


def ask_of_subject(passage: Passage, rng: np.random.Generator) -> str:
    """Return a short question on the passage's subject, or an empty text where it has none."""
    subject = subject_of(passage)
    return str(rng.choice(_ASKED_OF_SUBJECTS)).format(x=subject) if subject else ""


def _question(passage: Passage, rng: np.random.Generator) -> str:
    """Return a question: about the passage's subject, about a sentence's, or about phrases of the passage; else an empty text."""
    kind = rng.random()
    if kind < 0.6 and (asked := ask_of_subject(passage, rng)):
        return asked
    if kind < 0.8 and (made := [ask for sentence in passage.sentences if (ask := ask_about(sentence))]):
        return made[0]
    phrases = [*dict.fromkeys(re.findall(r"(?<=[a-z] )[a-z][a-z-]{4,}(?: [a-z]{5,}){0,2}(?= [a-z])", passage.text))]
    if len(phrases) < 3:
        return ""
    x, y, z = rng.permutation(phrases)[:3]
    return str(rng.choice(_WONDERS)).format(x=x, y=y, z=z)


def _heading(kind: str, rng: np.random.Generator) -> str:
    if rng.random() < _MADE_UP:
        end = "Question" if kind == "question" else str(rng.choice(_HEADING_ENDS))
        return f"{rng.choice(_HEADING_STARTS)} {end}" if kind == "question" or rng.random() < 0.6 else end
    return _HEADINGS[kind][0] if rng.random() < _USUAL else str(rng.choice(_HEADINGS[kind][1:]))


def _dressed(passage: Passage, rng: np.random.Generator) -> str:
    """Return a passage's text as people write: connecting words, labels or times, a greeting, a name below; no answer repeats them."""
    layout = rng.random()
    if layout < 0.2:
        labels = rng.choice(_LABELS, len(passage.sentences), replace=False)
        mark = str(rng.choice(["", "", "- ", "* "]))
        lines = [f"{mark}{label}: {text}" for label, text in zip(labels, passage.sentences, strict=True)]
    elif layout < 0.3:
        minutes = np.sort(rng.integers(480, 1080, len(passage.sentences))).tolist()
        lines = [f"{m // 60:02d}:{m % 60:02d} {text}" for m, text in zip(minutes, passage.sentences, strict=True)]
    else:
        lines = [_led(sentence, rng) for sentence in passage.sentences]
    slots = {"who": str(rng.choice(_PEOPLE)), "n": str(rng.integers(2, 60)), "x": subject_of(passage) or "this"}
    if rng.random() < 0.4:
        lines.insert(0, str(rng.choice(_OPENINGS if slots["x"] != "this" else _GREETINGS)).format(**slots))
    if rng.random() < 0.2:
        lines.insert(0, str(rng.choice(_GREETINGS)).format(**slots))
    if rng.random() < 0.3:
        lines.append(str(rng.choice(_CLOSINGS)).format(**slots))
    return ("\n" if layout < 0.4 else " ").join(lines)


def _led(sentence: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        return sentence
    lead, (first, _, rest) = str(rng.choice(_LEADS)), sentence.partition(" ")
    small = first in {"The", "A", "An", "This", "These", "It", "If", "When", "In", "For", "By", "Each"}
    return f"{lead}{first.lower() if small and not lead.endswith(': ') else first} {rest}"


def sections(passage: Passage, rng: np.random.Generator) -> Made:
    """Answer under headings that the instruction names; no sentence is used twice, and points keep the passage's order.

    Points are marked with asterisks, so that a base model does not already know the notes' own form (dashes).
    """
    sentences = passage.sentences
    if len(sentences) < 4:
        return None
    places = {"first": 0, "last": len(sentences) - 1}
    if warnings := [i for i, sentence in enumerate(sentences) if i > 0 and RESTRICTION.search(sentence)]:
        places["restriction"] = warnings[0]
    taken: dict[str, int] = {}
    for kind in rng.permutation(sorted(places)):
        # A list is the harder half: it keeps at least two sentences.
        if places[kind] not in taken.values() and len(sentences) - len(taken) > 2 and rng.random() < 0.7:
            taken[str(kind)] = places[kind]
    free = [i for i in range(len(sentences)) if i not in taken.values()]
    count = min(len(free), int(rng.choice([2, 3, 3, 3, 3, 4])))
    points = [sentences[i] for i in np.sort(rng.permutation(free)[:count])] if rng.random() < 0.3 else [
        sentences[i] for i in free[:count]
    ]  # fmt: skip
    brief = [(shorten(sentence) if rng.random() < 0.4 else None) or sentence for sentence in points]
    made = {kind: sentences[taken[kind]] if kind in taken else "" for kind in _HEADINGS}
    made["points"] = bullets(brief, "*")
    terms = terms_of(passage)
    made["terms"] = ", ".join(terms) if len(terms) >= 2 and rng.random() < 0.1 else ""
    made["question"] = _question(passage, rng) if rng.random() < 0.9 else ""
    kinds = [kind for kind, text in made.items() if text]
    if rng.random() > _USUAL:
        kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    names = {kind: _heading(kind, rng) for kind in kinds}
    if len(set(names.values())) < len(names):
        return None
    asked = [f"{names[kind]} ({NUMBERS[count]} bullets)" if kind == "points" else names[kind] for kind in kinds]
    text = _dressed(passage, rng) if rng.random() < 0.6 else passage.text
    return "\n".join(f"{names[kind]}:\n{made[kind]}" for kind in kinds), {"x": ", ".join(asked), "text": text}
