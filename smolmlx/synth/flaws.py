"""Notes with one flaw each, as long as the answer they stand beside: what preference training learns to avoid.

A flaw that adds words takes them back elsewhere: other lines are worded as another answer on the same concept words
them, or lose a side clause. `find_flaws` reads a flawed answer by rules of its own, so that making and checking differ.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from smolmlx.data.notes import Notes
from smolmlx.evals.notes import BOILERPLATE, sections, strict_compliance
from smolmlx.evals.parsers import bullet_lines
from smolmlx.evals.text import content_tokens
from smolmlx.synth.notes import Dice, note_words

ISSUES = ("fourth-bullet", "unsupported-claim", "text-after-question", "generic-close", "boilerplate")
MAX_GAP = 0.02
"""A rejected answer's number of words differs from the chosen one's by less than this share."""
UNSUPPORTED = 0.5
"""A line is a claim without support when at least this share of its terms is in neither passage nor chosen answer."""

_BREAKS = {
    "fourth-bullet": frozenset({"Key Points: 4 bullets, 3 expected"}),
    "text-after-question": frozenset(
        {"Follow-up Question: text after the first line", "Follow-up Question: does not end in '?'"}
    ),
}
"""Strict rules that a flaw breaks; the other flaws break none."""
_OPENINGS = ("It is important to note that", "This text discusses how")
_ENDINGS = ("which plays a crucial role", "and further research is needed")
_LIMITATIONS = ("Results may vary", "More research is needed", "It may not generalize to all cases")
_LIMITATION_TAILS = (
    "", "in practice", "in the real world", "depending on the situation", "in some other settings and conditions",
    "when the circumstances are different from the usual ones", "and there are always exceptions to every rule",
    "because every situation comes with its own challenges", "so some care should be taken before it is used",
)  # fmt: skip
_QUESTIONS = ("How does this work", "How can this be improved", "What are the implications of this")
_QUESTION_TAILS = (
    "", "in practice", "in future work", "in the real world", "and why does it matter", "and what else could be said here",
    "and what should everyone know about it in general", "and where could it be useful later on",
    "for everyone who may want to use it one day", "and what might the future bring for it",
)  # fmt: skip
_REMARKS = (
    "Hope that helps!", "I hope this helps.", "That is all for now.", "These notes cover the whole passage.",
    "Feel free to ask for more detail.", "Let me know if you need anything else.",
)  # fmt: skip
# A clause that only adds to the sentence before it. A sentence that opens with a clause, and one cut at a later comma,
# would not be whole, so neither is cut.
_SIDE_CLAUSE = re.compile(
    r"(?!(?:After|As|At|Although|Because|Before|By|During|For|From|If|In|On|Once|Rather|Since|Through|To|Under|Unlike|"
    r"Until|When|Whenever|Where|While|With|Without|\w+ing)\b)"
    r"(?P<head>[^,;:]+?)(?:, (?:and|but|so|then|hence|while|whereas|which|where|since|because|without|often|\w+ing) "
    r"| (?:because|while|whereas|although|unless|without|whenever|so that) ).+"
)
_LEANS = re.compile(
    r"[:;?]|^(?:It|They|This|These|That|Those|Such|Here|Even|Yet|But|And|So|Then|However)\b"
    r"|\b(?:I|we|We|you|You|my|My|our|Our|us|your|Your)\b"
)
"""What leans on the sentences around it: a label, a question, a word that points back, someone who speaks."""
# A clause with a subject of its own, which can stand alone: behind "because" any, behind ", and" one that names its subject.
_CLAUSE = re.compile(
    r"(?P<head>[A-Z][^,;:]+?(?: [^,;: ]+){3})"
    r"(?:,? (?:because|whereas|although|while) (?!of\b|\w+ing\b)|, (?:and|but|so|while) (?=(?:the|a|an|each|every|most|many|some|no)\b))"
    r"(?P<clause>[^,;:]+)\."
)
_MIN_HEAD_WORDS = 5
_ALIKE = 0.5
"""Two lines say the same when they share at least this part of their distinct terms."""
_MAX_NOVEL = 0.2
"""Most new terms, as a share, of a line that is to stand for another one."""
_MAX_EXTRA_WORDS = 14
_MAX_CLAUSE_WORDS = 20


@dataclass(frozen=True, slots=True)
class Note(Notes):
    """An answer with `after`, the text behind the question, which no good answer has."""

    after: str = ""

    def with_lines(self, lines: Sequence[str]) -> Note:
        return Note(lines[0], tuple(lines[1:-2]), lines[-2], lines[-1], self.after)

    def render(self) -> str:
        text = Notes.render(self)  # slots leave `super()` without its class
        return f"{text}\n{self.after}" if self.after else text


@dataclass(frozen=True, slots=True)
class NotesRow:
    """A row of the notes task with its answer read."""

    id: str
    passage: str
    answer: str
    note: Note
    by_rule: bool
    concept: str
    topic: str
    difficulty: str
    split: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The rows a flaw may take words from: those of the same split, by concept."""

    by_concept: Mapping[str, Sequence[NotesRow]]

    def siblings(self, row: NotesRow) -> Iterator[NotesRow]:
        return (other for other in self.by_concept[row.concept] if other.id != row.id)

    def strangers(self, row: NotesRow, dice: Dice) -> list[NotesRow]:
        """Rows of other concepts, those of the same topic first: the likeliest to be believed."""
        rows = [other for concept, rows in self.by_concept.items() if concept != row.concept for other in rows]
        return sorted(dice.shuffled(rows), key=lambda other: other.topic != row.topic)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A flawed note before its length is matched; lines in `locked` carry the flaw and stay."""

    note: Note
    locked: frozenset[int]


def read_note(answer: str) -> Note | None:
    """Take an answer apart; None where it is not laid out as `Notes.render` does, so that only the flaw would differ."""
    parts = sections(answer)
    question, _, after = parts["Follow-up Question"].partition("\n")
    note = Note(parts["Summary"], bullet_lines(parts["Key Points"]), parts["Limitation"], question, after.strip())
    return note if note.render() == answer else None


def gap(chosen: str, rejected: str) -> float:
    """Return the difference of two answers' words as a share of the chosen one's."""
    words = len(note_words(chosen))
    return (len(note_words(rejected)) - words) / words


def find_flaws(passage: str, chosen: str, rejected: str) -> set[str]:
    """Name every flaw of an answer beside the chosen one; what is wrong in a way that has no name is told in full."""
    problems = set(strict_compliance(rejected).problems)
    found = {issue for issue, broken in _BREAKS.items() if broken <= problems}
    problems -= {problem for issue in found for problem in _BREAKS[issue]}
    known = set(content_tokens(f"{passage}\n{chosen}"))
    parts = sections(rejected)
    body = [parts["Summary"], *bullet_lines(parts["Key Points"])]
    question = parts["Follow-up Question"].partition("\n")[0]
    closing = (parts["Limitation"].startswith(_LIMITATIONS), question.startswith(_QUESTIONS))
    if all(closing):
        found.add("generic-close")
    elif any(closing):
        problems.add("one of limitation and question is generic")
    if any(phrase in line.lower() for line in body for phrase in BOILERPLATE):
        found.add("boilerplate")
    claims = body if closing[0] else [*body, parts["Limitation"]]
    if any(_novelty(_without_phrases(line), known) >= UNSUPPORTED for line in claims):
        found.add("unsupported-claim")
    lines = [line.strip().removeprefix("- ").lower() for line in rejected.split("\n") if line.strip()]
    if len(set(lines)) < len(lines):
        problems.add("a line is repeated")
    return found | problems


def spoil(row: NotesRow, issue: str, neighbours: Neighbours, dice: Dice) -> str | None:
    """Return the row's answer with one flaw and nearly its length; None where no draft has that flaw alone."""
    wordings: dict[str, list[str]] = {}
    for draft in _DRAFTERS[issue](row, neighbours, dice):
        excess = len(note_words(draft.note.render())) - len(note_words(row.answer))
        if excess and not wordings:
            wordings = {line: dice.shuffled(sorted(_rewordings(row, line, neighbours))) for line in row.note.lines}
        note = _match_length(draft, excess, wordings) if excess else draft.note
        if note is None:
            continue
        rejected = note.render()
        if abs(gap(row.answer, rejected)) < MAX_GAP and find_flaws(row.passage, row.answer, rejected) == {issue}:
            return rejected
    return None


def _fourth_bullet(row: NotesRow, neighbours: Neighbours, dice: Dice) -> Iterator[_Draft]:
    """Add a bullet so that the number of bullets is all that is wrong: something new, half of a line, or a point again."""
    again = {text for line in row.note.lines[:-1] for text in _rewordings(row, line, neighbours)}
    fresh = [_with_bullet(row, extra) for extra in dice.shuffled(_unused(row, neighbours))]
    halves = dice.shuffled(_halved(row))
    yield from (*fresh, *halves) if dice.share() < 0.5 else (*halves, *fresh)
    plain = sorted(text for text in again if _is_plain(text) and not _begins_one(text, row.note.lines))
    yield from (_with_bullet(row, extra) for extra in dice.shuffled(plain))


def _with_bullet(row: NotesRow, extra: str) -> _Draft:
    points = (*row.note.key_points, extra)
    return _Draft(Note(row.note.summary, points, row.note.limitation, row.note.question), frozenset({len(points)}))


def _begins_one(text: str, lines: Sequence[str]) -> bool:
    """Say whether a text is a line or the beginning of one, so that adding it would repeat the line word for word."""
    return any(line.startswith(text.removesuffix(".")) for line in lines)


def _halved(row: NotesRow) -> list[_Draft]:
    """Return the note with one line divided at its side clause, which becomes a bullet: hardly a word more or less."""
    found = []
    lines = row.note.lines
    for place, line in enumerate(lines[:-1]):
        match = _CLAUSE.fullmatch(line)
        if match is None:
            continue
        clause = match["clause"][0].upper() + match["clause"][1:] + "."
        if not _is_plain(clause, most=_MAX_CLAUSE_WORDS):
            continue
        kept = [match["head"] + "." if spot == place else text for spot, text in enumerate(lines)]
        # Behind the line it was part of where that is a bullet, else behind the last one.
        spot = place + 1 if 0 < place <= len(row.note.key_points) else len(row.note.key_points) + 1
        note = row.note.with_lines([*kept[:spot], clause, *kept[spot:]])
        found.append(_Draft(note, frozenset({place + (place >= spot), spot})))
    return found


def _unsupported_claim(row: NotesRow, neighbours: Neighbours, dice: Dice) -> Iterator[_Draft]:
    """Put a bullet of another concept in the place of one: fluent, plausible, and not in the passage."""
    known = _known(row)
    sizes = {len(point.split()): place for place, point in enumerate(row.note.key_points, start=1)}
    for other in neighbours.strangers(row, dice):
        for claim in other.note.key_points:
            place = sizes.get(len(claim.split()))
            if place is not None and _novelty(claim, known) >= UNSUPPORTED:
                yield _swap(row, {place: claim})


def _text_after_question(row: NotesRow, neighbours: Neighbours, dice: Dice) -> Iterator[_Draft]:
    """Go on after the question, with a remark or with more of the passage."""
    remarks = dice.shuffled(_REMARKS)
    more = dice.shuffled(_unused(row, neighbours))
    # Remarks are few and passages many: the same few words in most pairs would be all there is to learn.
    for after in (*more, *remarks) if dice.share() < 0.5 else (*remarks, *more):
        note = row.note
        yield _Draft(Note(note.summary, note.key_points, note.limitation, note.question, after), frozenset())


def _generic_close(row: NotesRow, neighbours: Neighbours, dice: Dice) -> Iterator[_Draft]:
    """Close with a limitation and a question that would fit any passage."""
    limitations = [_joined(*pair, end=".") for pair in itertools.product(_LIMITATIONS, _LIMITATION_TAILS)]
    questions = [_joined(*pair, end="?") for pair in itertools.product(_QUESTIONS, _QUESTION_TAILS)]
    wanted = len(row.note.limitation.split()) + len(row.note.question.split())
    pairs = dice.shuffled(itertools.product(limitations, questions))
    for limitation, question in sorted(pairs, key=lambda p: abs(len(" ".join(p).split()) - wanted))[:8]:
        yield _swap(row, {4: limitation, 5: question})


def _boilerplate(row: NotesRow, neighbours: Neighbours, dice: Dice) -> Iterator[_Draft]:
    """Wrap the summary or a bullet in a phrase that fits any passage."""
    words = {word for other in neighbours.by_concept[row.concept] for word in f"{other.passage} {other.answer}".split()}
    for place, line in dice.shuffled(enumerate(row.note.lines[:4])):
        wrapped = [f"{opening} {_lowered(line, words)}" for opening in _OPENINGS]
        wrapped += [f"{line.removesuffix('.')}, {ending}." for ending in _ENDINGS if "," not in line]
        for text in dice.shuffled(wrapped):
            yield _swap(row, {place: text})


_DRAFTERS: Mapping[str, Callable[[NotesRow, Neighbours, Dice], Iterator[_Draft]]] = {
    "fourth-bullet": _fourth_bullet,
    "unsupported-claim": _unsupported_claim,
    "text-after-question": _text_after_question,
    "generic-close": _generic_close,
    "boilerplate": _boilerplate,
}


def _swap(row: NotesRow, lines: Mapping[int, str]) -> _Draft:
    """Replace lines of a note, counted from the summary, and lock them."""
    note = row.note.with_lines([lines.get(place, line) for place, line in enumerate(row.note.lines)])
    return _Draft(note, frozenset(lines))


def _match_length(draft: _Draft, excess: int, wordings: Mapping[str, Sequence[str]]) -> Note | None:
    """Reword as few unlocked lines as take `excess` words back; None where none do."""
    lines = draft.note.lines
    reached: dict[int, tuple[str, ...]] = {excess: ()}
    for place, line in enumerate(lines):
        others = () if place in draft.locked else wordings.get(line, ())
        # One text per length: which lengths add up is all that matters here. 0 keeps the line itself.
        choices = {len(other.split()) - len(line.split()): other for other in others} | {0: line}
        longer: dict[int, tuple[str, ...]] = {}
        for left, before in reached.items():
            for delta, text in choices.items():
                made = (*before, text)
                best = longer.get(left + delta)
                if best is None or _changed(made, lines) < _changed(best, lines):
                    longer[left + delta] = made
        reached = longer
    nearest = min(reached, key=lambda left: (abs(left), left))
    return draft.note.with_lines(reached[nearest]) if abs(nearest) < abs(excess) else None


def _changed(made: Sequence[str], lines: Sequence[str]) -> int:
    return sum(new != old for new, old in zip(made, lines, strict=False))


def _rewordings(row: NotesRow, line: str, neighbours: Neighbours) -> set[str]:
    """Return other wordings of a line: its head, and what siblings say for it that this passage supports too."""
    found = {head} if (head := _head(line)) else set()
    if line == row.note.question:
        # The questions on a concept fit any of its rule-made passages; a hand-written one asks about its own.
        return {other.note.question for other in neighbours.siblings(row) if row.by_rule and other.by_rule}
    known, others = _known(row), [text for text in row.note.lines if text != line]
    for other in neighbours.siblings(row):
        for text in other.note.lines[:-1]:
            same = _likeness(text, line) >= _ALIKE > max(_likeness(text, kept) for kept in others)
            if same and text != line and _novelty(text, known) <= _MAX_NOVEL:
                found |= {text, _head(text) or text}
    return found


def _unused(row: NotesRow, neighbours: Neighbours) -> list[str]:
    """Return short sentences that the passage supports and no line of the notes says, in a fixed order."""
    # The first sentence of a passage opens it; it seldom says anything.
    told = re.split(r"(?<=[.!])\s+", row.passage.replace("\n* ", " ").replace("\n", " "))[1:]
    told += [text for other in neighbours.siblings(row) for text in other.note.lines[:-1]]
    known = set(content_tokens(row.passage))
    found: dict[str, None] = {}
    for text in told:
        for sentence in (text, _head(text)):
            if sentence and _is_plain(sentence) and _novelty(sentence, known) <= _MAX_NOVEL:
                found[sentence] = None
    return [text for text in found if max(_likeness(text, line) for line in row.note.lines) < _ALIKE]


def _is_plain(sentence: str, most: int = _MAX_EXTRA_WORDS) -> bool:
    """Say whether a text can stand alone as a bullet: one sentence of at most `most` words, without a label before it."""
    words = sentence.split()
    return 3 < len(words) <= most and sentence[0].isupper() and sentence.endswith(".") and not _LEANS.search(sentence)


def _head(sentence: str) -> str | None:
    """Return a sentence without its side clause, if what is left is long enough to say something."""
    match = _SIDE_CLAUSE.fullmatch(sentence)
    return match["head"] + "." if match and len(match["head"].split()) >= _MIN_HEAD_WORDS else None


@functools.lru_cache(maxsize=1 << 14)
def _terms(line: str) -> frozenset[str]:
    return frozenset(content_tokens(line))


@functools.lru_cache(maxsize=1 << 10)
def _known(row: NotesRow) -> frozenset[str]:
    return frozenset(content_tokens(f"{row.passage}\n{row.answer}"))


def _novelty(line: str, known: Set[str]) -> float:
    """Return the share of a line's terms that are not known; 0 for a line without terms."""
    terms = content_tokens(line)
    return sum(term not in known for term in terms) / len(terms) if terms else 0.0


def _likeness(one: str, other: str) -> float:
    """Return the share of distinct terms that two lines have in common (Jaccard)."""
    first, second = _terms(one), _terms(other)
    return len(first & second) / len(first | second) if first or second else 0.0


def _without_phrases(line: str) -> str:
    for phrase in (*_OPENINGS, *_ENDINGS, *BOILERPLATE):
        line = re.sub(re.escape(phrase), " ", line, flags=re.IGNORECASE)
    return line


def _lowered(line: str, words: Iterable[str]) -> str:
    """Write a sentence's first word small where the concept's texts do so inside a sentence: 'The', but not 'Adam'."""
    first = line.split()[0]
    small = first.lower() in words or first in ("A", "An", "The", "Each", "Every", "In")
    return line[:1].lower() + line[1:] if small and first[1:] == first[1:].lower() else line


def _joined(head: str, tail: str, end: str) -> str:
    return f"{head} {tail}".strip() + end
