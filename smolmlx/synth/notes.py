"""Notes rows by rule, so that a data set for the notes task exists that nobody else owns and anyone can rebuild.

A row is a concept (five facts, each in one or two long wordings and a short one) seen through an input pattern (order and
connecting words of the passage). The notes say only what the passage says, mostly in its words and always in its order: its first fact is the
summary. `python -m smolmlx.synth.notes --out data/notes [--check]` rebuilds the files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from smolmlx.data.notes import DIFFICULTIES, FIELDS, INSTRUCTION, MORE_TOPICS, SPLITS, TOPICS, Notes, input_sha256
from smolmlx.errors import DataError, SmolError, VerificationError

SEED = 17
SPLIT_ROWS = {"train": 400, "validation": 75, "test": 125}
SPLIT_CONCEPTS = {"train": 64, "validation": 12, "test": 20}
"""Concepts of the bank that each split is dealt; those under `concepts/train` go to train besides."""
INPUT_WORDS = (50, 110)
OUTPUT_WORDS = (40, 80)
"""Bounds on `note_words`: the text of an answer, its headers and bullet marks not counted."""
FACTS = ("what", "how", "gain", "when", "limit")
ASIDE = "aside"
HAND_PATTERN = "by-hand"
"""The pattern of gold rows, which follow none."""
LONG_SHARES = (0.2, 0.0)
"""Chance that the passage tells a fact at length, so that the notes must compress it: first draft, last draft."""
LEAD_SHARE = 0.35
"""Chance that connecting words stand before a fact, in patterns that are not lists of labelled lines."""
TRIM_SHARE = 0.3
"""Chance that a note drops a side clause its sentence can do without."""
PATTERN_ASK_SHARE = 0.85
"""Chance that the question is one the pattern's readers would ask, and not the concept's own."""
MIN_SUPPORT = 0.6
"""Least share of the notes' terms, question aside, that must stand in the passage."""
DRAFTS = 30
"""Drafts tried for one pattern and choice of facts before the next choice has its turn."""
SPLIT_TRIALS = 50_000

# A sentence of two halves whose second one only adds to the first: cutting it leaves a true and complete sentence.
_SIDE_CLAUSE = re.compile(
    r"(?P<head>[^,]+), "
    r"(and|so|then|hence|while|whereas|which|since|because|without|keeping|making|reducing|often) [^,]+"
)
_MIN_TRIMMED_WORDS = 7
_STEM = 6
"""Letters of a word that must agree for two words to count as forms of one."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact of a concept: the same thing said once or twice at length and once in brief."""

    long: tuple[str, ...]
    short: str


@dataclass(frozen=True, slots=True)
class Concept:
    """One entry of the concept bank."""

    id: str
    name: str
    topic: str
    difficulty: str
    facts: Mapping[str, Fact]
    ask: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pattern:
    """How a kind of passage orders facts and what it says between them; patterns.yaml explains the placeholders."""

    id: str
    orders: tuple[tuple[str, ...], ...]
    open: tuple[str, ...]
    leads: Mapping[str, tuple[str, ...]]
    asides: tuple[Mapping[str, str], ...]
    asks: tuple[str, ...]
    close: tuple[str, ...]
    joint: str


TOLD: tuple[frozenset[str], ...] = (
    frozenset({"what", "how", "gain", "when"}),
    frozenset({"what", "how", "gain", ASIDE}),
    frozenset({"what", "how", "when", ASIDE}),
    frozenset({"what", "gain", "when", ASIDE}),
    frozenset({"how", "gain", "when", ASIDE}),
)
"""What a passage tells besides its limitation; `aside` is the pattern's own."""


@dataclass(frozen=True, slots=True)
class Outline:
    """A passage's parts in the order it tells them; the notes keep that order, with the first fact as the summary."""

    parts: tuple[str, ...]

    @property
    def summary(self) -> str:
        return next(part for part in self.parts if part in FACTS and part != "limit")

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(part for part in self.parts if part not in ("limit", self.summary))


@dataclass(frozen=True, slots=True)
class Phrasebook:
    """Everything in patterns.yaml, and the words of the concept bank that may lose their capital letter (lowerable)."""

    patterns: tuple[Pattern, ...]
    slots: Mapping[str, tuple[str, ...]]
    lowerable: frozenset[str]
    briefs: Mapping[str, Mapping[str, str]]
    kin: tuple[tuple[str, ...], ...]
    """Concepts of nearly one subject, which must share a split."""


@dataclass(frozen=True, slots=True)
class Source:
    """What the data set is made from: the concept bank, the phrasebook, and the hand-written rows of each concept."""

    concepts: tuple[Concept, ...]
    more: tuple[Concept, ...]
    """Concepts for the train split alone: a model that has seen few subjects remembers them instead of reading."""
    phrasebook: Phrasebook
    gold: Mapping[str, tuple[Mapping[str, str], ...]]


class Dice:
    """Seeded choices, made from `Generator.random` alone: numpy keeps its stream, but not `choice`'s, over versions."""

    def __init__(self, *seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def share(self) -> float:
        return float(self._generator.random())

    def pick(self, options: Sequence[_T]) -> _T:
        return options[int(self.share() * len(options))]

    def shuffled(self, items: Iterable[_T]) -> list[_T]:
        keyed = [(self.share(), item) for item in items]
        return [item for _, item in sorted(keyed, key=lambda pair: pair[0])]


@dataclass(slots=True)
class _Usage:
    """How often patterns and variants were used, so that the next row takes the rarest."""

    patterns: Counter[str] = field(default_factory=Counter)
    told: Counter[frozenset[str]] = field(default_factory=Counter)
    notes: set[str] = field(default_factory=set)

    def count(self, pattern: Pattern, told: frozenset[str], notes: str) -> None:
        self.patterns[pattern.id] += 1
        self.told[told] += 1
        self.notes.add(notes)


def read_source(folder: Path) -> Source:
    """Read `concepts/*.yaml`, `gold/*.jsonl` and `patterns.yaml` under `folder`; raise DataError listing all faults."""
    concepts, more = read_concepts(folder / "concepts", TOPICS), read_concepts(folder / "concepts/train", MORE_TOPICS)
    if shared := {concept.id for concept in concepts} & {concept.id for concept in more}:
        raise DataError(f"{folder}: concepts of train alone that the bank has, too", sorted(shared))
    gold = read_gold(folder / "gold", {concept.id: concept for concept in concepts})
    return Source(concepts, more, read_phrasebook(folder / "patterns.yaml", concepts, more), gold)


def read_concepts(folder: Path, topics: Sequence[str]) -> tuple[Concept, ...]:
    """Read a concept bank, one YAML list per topic, sorted by id."""
    entries = [
        (f"{path.name}[{index}]", path.stem, entry)
        for path in sorted(folder.glob("*.yaml"))
        for index, entry in enumerate(_yaml(path) or ())
    ]
    problems = [
        f"{place}: {message}" for place, topic, entry in entries for message in _entry_faults(topic, entry, topics)
    ]
    counts = Counter(entry.get("id") for _, _, entry in entries if isinstance(entry, dict))
    problems += [f"concept id '{name}' used {count} times" for name, count in counts.items() if count > 1]
    if problems or not entries:
        raise DataError(f"{folder}: not a concept bank", problems or ["no *.yaml with concepts in it"])
    return tuple(sorted((_concept(topic, entry) for _, topic, entry in entries), key=lambda concept: concept.id))


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML: {error}") from error


def _concept(topic: str, entry: Mapping[str, Any]) -> Concept:
    facts = {name: Fact(tuple(entry[name]["long"]), entry[name]["short"]) for name in FACTS}
    return Concept(entry["id"], entry["name"], topic, entry["difficulty"], facts, tuple(entry["ask"]))


def _entry_faults(topic: str, entry: object, topics: Sequence[str]) -> list[str]:
    if not isinstance(entry, dict):
        return [f"expected a mapping, found {type(entry).__name__}"]
    faults = [f"missing '{key}'" for key in ("id", "name", "difficulty", *FACTS, "ask") if key not in entry]
    if faults:
        return faults
    if topic not in topics:
        faults.append(f"unknown topic '{topic}' (known: {', '.join(topics)})")
    if entry["difficulty"] not in DIFFICULTIES:
        faults.append(f"unknown difficulty {entry['difficulty']!r} (known: {', '.join(DIFFICULTIES)})")
    for name in FACTS:
        faults += [f"{entry['id']}.{name}: {fault}" for fault in _fact_faults(entry[name])]
    asks = entry["ask"] if isinstance(entry["ask"], list) else [entry["ask"]]
    faults += [f"{entry['id']}.ask: {fault}" for ask in asks for fault in _sentence_faults(ask, "?")]
    return faults


def _fact_faults(fact: object) -> list[str]:
    if not isinstance(fact, dict) or not isinstance(fact.get("long"), list) or "short" not in fact:
        return ["expected `long` (a list of one or two sentences) and `short`"]
    faults = [] if len(fact["long"]) in (1, 2) else [f"expected 1 or 2 long wordings, found {len(fact['long'])}"]
    return faults + [fault for text in (*fact["long"], fact["short"]) for fault in _sentence_faults(text, ".")]


def _sentence_faults(text: object, end: str) -> list[str]:
    """List why a text is not one plain sentence; what passes here cannot break the layout of an answer."""
    if not isinstance(text, str):
        return [f"expected text, found {text!r}"]
    checks = {
        f"does not end with '{end}'": text.endswith(end),
        "does not start with a capital letter": text[:1].isupper() or text[:1].isdigit(),
        "holds a line break or a blank at an end": text == " ".join(text.split()),
        "is more than one sentence": not re.search(r"[.!?]\s+[A-Z]|\?.", text),
        "holds a colon": ":" not in text,
    }
    return [f"{message}: {text!r}" for message, passed in checks.items() if not passed]


def read_gold(folder: Path, concepts: Mapping[str, Concept]) -> dict[str, tuple[Mapping[str, str], ...]]:
    """Read hand-written rows, `{concept, difficulty, input, output}` a line, grouped by concept."""
    grouped: dict[str, list[Mapping[str, str]]] = {}
    problems: list[str] = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                problems.append(f"{path.name}:{number}: not JSON: {error}")
                continue
            problems += [f"{path.name}:{number}: {fault}" for fault in _gold_faults(row, path.stem, concepts)]
            grouped.setdefault(str(row.get("concept")), []).append(row)
    if problems:
        raise DataError(f"{folder}: not hand-written notes", problems)
    return {name: tuple(rows) for name, rows in grouped.items()}


def _gold_faults(row: Mapping[str, str], topic: str, concepts: Mapping[str, Concept]) -> list[str]:
    faults = [f"missing '{key}'" for key in ("concept", "difficulty", "input", "output") if key not in row]
    if faults:
        return faults
    concept = concepts.get(row["concept"])
    if concept is None or concept.topic != topic:
        return [f"topic '{topic}' has no concept '{row['concept']}'"]
    if concept.difficulty != row["difficulty"]:
        return [f"difficulty '{row['difficulty']}', but the bank says '{concept.difficulty}'"]
    return []


def read_phrasebook(path: Path, concepts: Sequence[Concept], more: Sequence[Concept] = ()) -> Phrasebook:
    """Read the patterns, and learn from the concepts which sentence openings may be written small."""
    content = _yaml(path)
    briefs, kin = content["briefs"], tuple(map(tuple, content["kin"]))
    named = {*briefs, *(name for group in kin for name in group)} - {concept.id for concept in concepts}
    problems = [f"no concept '{name}' in the bank" for name in sorted(named)]
    for name, brief in briefs.items():
        problems += [f"briefs.{name}: {fault}" for text in brief.values() for fault in _sentence_faults(text, ".")]
    if problems:
        raise DataError(str(path), problems)
    slots = {name: tuple(map(str, options)) for name, options in content["slots"].items()}
    return Phrasebook(tuple(map(_pattern, content["patterns"])), slots, _lowerable([*concepts, *more]), briefs, kin)


def _pattern(entry: Mapping[str, Any]) -> Pattern:
    return Pattern(
        id=entry["id"],
        orders=tuple(tuple(order) for order in entry["orders"]),
        open=tuple(entry["open"]),
        leads={part: tuple(leads) for part, leads in entry["leads"].items()},
        asides=tuple(entry["asides"]),
        asks=tuple(entry["asks"]),
        close=tuple(entry["close"]),
        joint=entry["joint"],
    )


def _lowerable(concepts: Sequence[Concept]) -> frozenset[str]:
    """Collect words seen in lower case inside a sentence: 'The' may become 'the', but 'Adam' or 'LoRA' may not."""
    sentences = [text for concept in concepts for fact in concept.facts.values() for text in (*fact.long, fact.short)]
    inner = " ".join([concept.name for concept in concepts] + [text.partition(" ")[2] for text in sentences])
    # 'Kept it because because ...': a reason cannot follow the leads that give one.
    return frozenset(word.strip(",.;()") for word in inner.split() if word == word.lower()) - {"because", "since"}


def assign_splits(source: Source, dice: Dice) -> dict[str, str]:
    """Give each concept a split, by seeded trials until topics, difficulties and gold rows are evenly spread."""
    by_topic = {topic: [c for c in source.concepts if c.topic == topic] for topic in TOPICS}
    if len(source.concepts) != sum(SPLIT_CONCEPTS.values()):
        raise DataError(f"expected {sum(SPLIT_CONCEPTS.values())} concepts, found {len(source.concepts)}")
    for _ in range(SPLIT_TRIALS):
        splits = _draw_splits(by_topic, dice)
        if _is_spread(splits, source):
            return splits
    raise DataError(f"no even assignment of concepts to splits in {SPLIT_TRIALS} trials")


def _draw_splits(by_topic: Mapping[str, Sequence[Concept]], dice: Dice) -> dict[str, str]:
    """Draw splits with equal numbers per topic; what does not divide goes to validation first, to test last."""
    splits = {}
    for index, topic in enumerate(dice.shuffled(by_topic)):
        whole, rest = divmod(SPLIT_CONCEPTS["validation"], len(by_topic))
        validation = whole + (index < rest)
        whole, rest = divmod(SPLIT_CONCEPTS["test"], len(by_topic))
        held = validation + whole + (index >= len(by_topic) - rest)
        for place, concept in enumerate(dice.shuffled(by_topic[topic])):
            splits[concept.id] = "validation" if place < validation else "test" if place < held else "train"
    return splits


def _is_spread(splits: Mapping[str, str], source: Source) -> bool:
    if any(len({splits[name] for name in group}) > 1 for group in source.phrasebook.kin):
        return False
    gold_rows = sum(map(len, source.gold.values()))
    for split in SPLITS:
        members = [concept for concept in source.concepts if splits[concept.id] == split]
        levels = Counter(concept.difficulty for concept in members)
        gold = sum(len(source.gold.get(concept.id, ())) for concept in members)
        share = gold_rows * len(members) / len(source.concepts)
        if max(levels.values()) - min(levels[level] for level in DIFFICULTIES) > 1 or abs(gold - share) >= 2:
            return False
    return True


def build_rows(source: Source, seed: int = SEED) -> list[dict[str, str]]:
    """Make all rows, split after split; the same source and seed give the same rows on any machine."""
    splits = assign_splits(source, Dice(seed)) | {concept.id: "train" for concept in source.more}
    rows: list[dict[str, str]] = []
    for place, split in enumerate(SPLITS):
        dice = Dice(seed, place)  # of its own, so that a change to one split leaves the others as they are
        members = dice.shuffled(c for c in (*source.concepts, *source.more) if splits[c.id] == split)
        rows += dice.shuffled(_split_rows(members, split, source, dice))
    return [{"id": f"notes-{number:04d}", **row} for number, row in enumerate(rows, start=1)]


def _split_rows(members: Sequence[Concept], split: str, source: Source, dice: Dice) -> list[dict[str, str]]:
    each, extra = divmod(SPLIT_ROWS[split], len(members))
    usage, rows = _Usage(), []
    for place, concept in enumerate(members):
        gold = source.gold.get(concept.id, ())
        rows += [_record(row["input"], row["output"], "gold", concept, HAND_PATTERN, split) for row in gold]
        wanted = each + (place < extra) - len(gold)
        rows += [
            _record(text, notes, "rule", concept, pattern.id, split)
            for pattern, text, notes in _drafts(concept, wanted, source.phrasebook, usage, dice)
        ]
    return rows


def _record(text: str, notes: str, source: str, concept: Concept, pattern: str, split: str) -> dict[str, str]:
    """Lay out one record without its id, in the order of FIELDS."""
    labels = (source, concept.id, concept.topic, concept.difficulty, pattern, split)
    return dict(zip(FIELDS[1:], (INSTRUCTION, text, notes, *labels, input_sha256(text)), strict=True))


def _rarest(options: Iterable[_T], used: Mapping[_T, int], dice: Dice) -> list[_T]:
    return sorted(dice.shuffled(options), key=lambda option: used[option])


def _drafts(
    concept: Concept, wanted: int, book: Phrasebook, usage: _Usage, dice: Dice
) -> list[tuple[Pattern, str, str]]:
    """Draft `wanted` passages with their notes, each in another pattern; a pattern that never fits is passed over."""
    drafts: list[tuple[Pattern, str, str]] = []
    by_id = {pattern.id: pattern for pattern in book.patterns}
    for name in _rarest(by_id, usage.patterns, dice):
        if len(drafts) < wanted and (draft := _draft(concept, by_id[name], book, usage, dice)):
            drafts.append((by_id[name], *draft))
    if len(drafts) < wanted:
        raise DataError(f"concept '{concept.id}': {len(drafts)} of {wanted} passages fit the length bounds")
    return drafts


def _draft(concept: Concept, pattern: Pattern, book: Phrasebook, usage: _Usage, dice: Dice) -> tuple[str, str] | None:
    """Draft one passage and its notes until they fit the bounds; the rarest choices of facts have the first tries."""
    for kinds in _rarest(TOLD, usage.told, dice):
        order = dice.pick(pattern.orders)
        outline = Outline(tuple(part for part in order if part in kinds or part == "limit"))
        aside = _aside(concept, pattern, book, dice)
        if not _may_fit(concept, pattern, outline, aside["note"], book):
            continue
        for long_share in np.linspace(*LONG_SHARES, DRAFTS).tolist():
            asks = pattern.asks if dice.share() < PATTERN_ASK_SHARE else concept.ask
            ask = _filled(dice.pick(asks), aside)
            told = {name: _wording(fact, long_share, dice) for name, fact in concept.facts.items()}
            notes = _notes(concept, outline, aside["note"], ask, book, dice)
            # The passage is the costly half, so answers of the wrong length do not get one.
            if notes in usage.notes or not _within(note_words(notes), OUTPUT_WORDS):
                continue
            text = _passage(pattern, outline, told, aside, book, dice)
            if fits(text, notes):
                usage.count(pattern, kinds, notes)
                return text, notes
    return None


def _notes(concept: Concept, outline: Outline, aside: str, ask: str, book: Phrasebook, dice: Dice) -> str:
    """Write the answer to a passage with this outline."""
    shorts = _shorts(concept, book)
    brief = {name: _trimmed(short) if dice.share() < TRIM_SHARE else short for name, short in shorts.items()}
    brief[ASIDE] = aside
    return Notes(shorts[outline.summary], tuple(brief[part] for part in outline.points), brief["limit"], ask).render()


def _shorts(concept: Concept, book: Phrasebook) -> dict[str, str]:
    return {name: fact.short for name, fact in concept.facts.items()} | dict(book.briefs.get(concept.id, {}))


def _may_fit(concept: Concept, pattern: Pattern, outline: Outline, aside: str, book: Phrasebook) -> bool:
    """Tell whether the summary would name the concept and the shortest answer keep the bound, before any draft."""
    shorts = _shorts(concept, book)
    brief = {name: _trimmed(short) for name, short in shorts.items()} | {ASIDE: aside}
    parts = [shorts[outline.summary], *(brief[part] for part in outline.points), brief["limit"]]
    least = len(" ".join(parts).split()) + min(
        len(ask.replace("{name}", concept.name).split()) for ask in (*concept.ask, *pattern.asks)
    )
    return least <= OUTPUT_WORDS[1] and _is_named(concept, shorts[outline.summary])


def _is_named(concept: Concept, summary: str) -> bool:
    """Tell whether a summary holds half the words of the concept's name, in any form, or the start of its id."""
    terms, stems = _terms(summary), {term[:_STEM] for term in _terms(concept.name)}
    named = sum(any(term.startswith(stem) for term in terms) for stem in stems)
    return 2 * named >= len(stems) or any(term.startswith(concept.id[:_STEM]) for term in terms)


def _passage(
    pattern: Pattern, outline: Outline, told: Mapping[str, str], aside: Mapping[str, str], book: Phrasebook, dice: Dice
) -> str:
    """Write a passage that tells every part of an outline, in its order."""
    parts = [aside["said"] if part == ASIDE else _led(told[part], pattern, part, book, dice) for part in outline.parts]
    sentences = [dice.pick(pattern.open), *parts, dice.pick(pattern.close)]
    return pattern.joint.join(_filled(sentence, aside) for sentence in sentences if sentence)


def _aside(concept: Concept, pattern: Pattern, book: Phrasebook, dice: Dice) -> dict[str, str]:
    """Pick an aside and a value for every slot of the pattern's own sentences."""
    values = {name: dice.pick(options) for name, options in book.slots.items()} | {"name": concept.name}
    values["person2"] = dice.pick([person for person in book.slots["person"] if person != values["person"]])
    values |= {name.capitalize(): value[:1].upper() + value[1:] for name, value in values.items()}
    return values | {key: _filled(text, values) for key, text in dice.pick(pattern.asides).items()}


def _wording(fact: Fact, long_share: float, dice: Dice) -> str:
    return dice.pick(fact.long) if dice.share() < long_share else fact.short


def _trimmed(sentence: str) -> str:
    match = _SIDE_CLAUSE.fullmatch(sentence.removesuffix("."))
    return match["head"] + "." if match and len(match["head"].split()) >= _MIN_TRIMMED_WORDS else sentence


def _led(sentence: str, pattern: Pattern, part: str, book: Phrasebook, dice: Dice) -> str:
    """Put connecting words before a fact; words that run into the sentence need one that may start small."""
    leads = pattern.leads[part] if pattern.joint == "\n" or dice.share() < LEAD_SHARE else ()
    opening = sentence.split()[0].strip(",")
    small = opening.lower() in book.lowerable and opening[1:] == opening[1:].lower()
    lead = dice.pick([lead for lead in leads if small or "{f}" not in lead] or ["{F}"])
    return lead.replace("{F}", sentence).replace("{f}", sentence[:1].lower() + sentence[1:])


def _filled(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], text)


def fits(text: str, notes: str) -> bool:
    """Tell whether a passage and its notes keep the length bounds and the notes rest on the passage."""
    lengths = _within(text.split(), INPUT_WORDS) and _within(note_words(notes), OUTPUT_WORDS)
    return lengths and support(text, notes) >= MIN_SUPPORT


def _within(words: Sequence[str], bounds: tuple[int, int]) -> bool:
    return bounds[0] <= len(words) <= bounds[1]


def note_words(notes: str) -> list[str]:
    """Return the words of an answer without its headers and bullet marks."""
    return [word for line in notes.split("\n") if not line.endswith(":") for word in line.removeprefix("- ").split()]


def support(text: str, notes: str) -> float:
    """Return the share of the notes' terms, question aside, that stand in the passage."""
    known = set(_terms(text))
    terms = _terms(" ".join(note_words(notes.partition("\nFollow-up Question:")[0])))
    return sum(term in known for term in terms) / len(terms)


def _terms(text: str) -> list[str]:
    return re.findall(r"[a-z][a-z0-9-]{3,}", text.lower())


def build_files(folder: Path, seed: int = SEED) -> dict[str, str]:
    """Return the generated files of `folder`, name to content: one JSON-lines file per split and the manifest."""
    rows = build_rows(read_source(folder), seed)
    files = {f"{split}.jsonl": _json_lines(row for row in rows if row["split"] == split) for split in SPLITS}
    return files | {"manifest.json": json.dumps(_manifest(folder, rows, files, seed), indent=2) + "\n"}


def _json_lines(rows: Iterable[Mapping[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _manifest(folder: Path, rows: Sequence[Mapping[str, str]], files: Mapping[str, str], seed: int) -> dict[str, Any]:
    # ood.jsonl is written by hand and never rebuilt, but the manifest pins it with the sources.
    names = ("concepts/*.yaml", "concepts/train/*.yaml", "gold/*.jsonl", "patterns.yaml", "ood.jsonl")
    sources = {path.relative_to(folder).as_posix(): path for name in names for path in sorted(folder.glob(name))}
    counted = ("split", "source", "topic", "difficulty", "pattern")
    return {
        "generator": "python -m smolmlx.synth.notes --out data/notes",
        "seed": seed,
        "rows": len(rows),
        "counts": {name: dict(sorted(Counter(row[name] for row in rows).items())) for name in counted},
        "concepts": {split: sorted({row["concept"] for row in rows if row["split"] == split}) for split in SPLITS},
        "sha256": {name: _sha256(content) for name, content in files.items()},
        "sources_sha256": {name: _sha256(path.read_text(encoding="utf-8")) for name, path in sources.items()},
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def check_files(folder: Path, seed: int = SEED) -> None:
    """Raise VerificationError naming every generated file that a rebuild would change."""
    files = build_files(folder, seed)
    stale = [
        f"{name}: {'differs from a rebuild' if (folder / name).exists() else 'is missing'}"
        for name, content in files.items()
        if not (folder / name).exists() or (folder / name).read_bytes() != content.encode("utf-8")
    ]
    if stale:
        raise VerificationError(f"{folder}: not what its sources make (run without --check to rebuild)", stale)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rebuild or check the generated files; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m smolmlx.synth.notes", description="Rebuild the notes data set.")
    parser.add_argument("--out", type=Path, default=Path("data/notes"), help="folder of the sources and the results")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of splits and drafts (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a rebuild would change a file")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            check_files(options.out, options.seed)
        else:
            for name, content in build_files(options.out, options.seed).items():
                (options.out / name).write_bytes(content.encode("utf-8"))
    except SmolError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
