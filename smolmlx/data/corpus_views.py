"""Chat views of documentation, made by rule: they teach a tiny model the ChatML tokens and to copy from context."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from smolmlx.data.corpus_pages import (
    WORD,
    Document,
    Page,
    Passage,
    digest,
    is_whole_sentence,
    passages,
    split_sentences,
)

_COMMON_TOPICS = (
    *("matrix", "thread", "socket", "image", "graph", "token", "timezone", "polynomial", "password", "directory"),
    *("gradient", "cache", "column", "calendar", "audio", "permutation", "decorator", "checksum", "quantile", "font"),
)
_VERBS = (
    "returns|uses|takes|provides|allows|contains|creates|represents|computes|describes|specifies|controls|determines|supports|"
    "requires|raises|stores|holds|works|means|defines|converts|accepts|handles|makes|gives|runs|performs|implements|indicates|"
    "sets|keeps|calls|checks|adds|removes|reads|writes|loads|produces|generates|expects|needs|ensures|includes|replaces|maps"
)
_AUXILIARIES = "is|are|was|were|can|will|must|should|may"
_CLAUSE = re.compile(
    r"^((?:The|A|An|This|Each|Every|These|All|Any)(?: [\w'-]+| `[^`]+`){1,4}?|`[^`]+`)"
    rf" ({_AUXILIARIES}|{_VERBS})\b(?: (be|not|also|only))? ?(\w*)"
)
_UNFINISHED = re.compile(
    r"\b(?:that|which|if|when|where|who|it|you|we|they|the|a|an)\b|\b(?:in|of|for|to|and|or|with|by)$"
)
_RESTRICTION = re.compile(r"\b(?:not|only|cannot|must|never|unless|except|without|no longer)\b")
_PLAINWORDS = frozenset(
    {"True", "False", "None", "If", "The", "should", "before", "return", "returns", "because", "whether"}
)
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def _terms(passage: Passage) -> list[str]:
    """Return up to five names, code spans and repeated long words of a passage, in order of appearance."""
    text = passage.text
    counts = Counter(WORD.findall(text.lower()))
    found: dict[str, None] = {}
    for match in re.finditer(r"`([^`]+)`|(?<=[a-z,] )([A-Z][\w-]+)|\b([a-z][a-z-]{5,})\b", text):
        term = next(group for group in match.groups() if group)
        if term not in _PLAINWORDS and (not match.group(3) or counts[term] > 1):
            found.setdefault(term)
    return list(found)[:5]


def ask_about(sentence: str) -> str | None:
    """Turn a sentence that opens with a plain subject and verb into a question, or return None."""
    if not (found := _CLAUSE.match(sentence)):
        return None
    subject, verb, adverb, following = found.groups()
    if _UNFINISHED.search(subject):
        return None
    subject = subject if subject.startswith("`") else subject[0].lower() + subject[1:]
    participle = following.endswith("ed") or following in {
        "given",
        "set",
        "written",
        "taken",
        "chosen",
        "known",
        "shown",
    }
    if verb in {"is", "are", "was", "were"}:
        return f"How {verb} {subject} {following}?" if participle and adverb != "not" else f"What {verb} {subject}?"
    if verb in {"can", "will", "must", "should", "may"}:
        return (
            f"When {verb} {subject} be {following}?" if adverb == "be" and participle else f"What {verb} {subject} do?"
        )
    base = re.sub(r"ie$", "y", verb[:-1])
    return f"How does {subject} work?" if len(sentence) % 3 == 0 else f"What does {subject} {base}?"


def shorten(sentence: str) -> str | None:
    """Drop a sentence's parentheses and its subordinate clause; None if that changes too little or too much."""
    short = re.sub(r"\s*\([^()]*\)", "", sentence)
    if short.count(",") == 1:
        short = re.sub(
            r"^(?:If|When|For|By|Since|While|Although|After|Before|Unless|In|Note that) [^,]+, (?:then )?", "", short
        )
    short = re.sub(
        r",? (?:(?:at|in|of|to|for|from|by|with|on|through|after) which|which|"
        r"because|although|since|while|unless|so that|in order to|whereas|even if)\b.*$",
        ".",
        short,
    )
    short = short[:1].upper() + short[1:]
    return short if len(short.split()) >= 5 and len(short) < 0.85 * len(sentence) else None


Made = tuple[str, Mapping[str, str]] | None
"""An answer and what its instruction's wording names (`text`: in place of the passage's), or None where it does not apply."""


def _position(index: int, least: int) -> Callable[[Passage, np.random.Generator], Made]:
    return lambda passage, rng: (passage.sentences[index], {}) if len(passage.sentences) >= least else None


def _bullets(sentences: Iterable[str], mark: str = "-") -> str:
    return "\n".join(f"{mark} {sentence}" for sentence in sentences)


def _first_bullets(passage: Passage, rng: np.random.Generator) -> Made:
    count = int(rng.choice([2, 3, 3, 3]))
    return (_bullets(passage.sentences[:count]), {"n": _NUMBERS[count]}) if len(passage.sentences) >= count else None


def _some_bullets(passage: Passage, rng: np.random.Generator) -> Made:
    if len(passage.sentences) < 4:
        return None
    chosen = np.sort(rng.choice(len(passage.sentences), 3, replace=False))
    return _bullets(passage.sentences[i] for i in chosen), {}


def _numbered(passage: Passage, rng: np.random.Generator) -> Made:
    return "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(passage.sentences, 1)), {}


def _mention(passage: Passage, rng: np.random.Generator) -> Made:
    holders = {term: [s for s in passage.sentences if term in s] for term in _terms(passage)}
    unique = [term for term, sentences in holders.items() if len(sentences) == 1]
    if not unique:
        return None
    term = str(rng.choice(unique))
    return holders[term][0], {"x": term}


def _mentioned(passage: Passage, rng: np.random.Generator) -> Made:
    absent = [topic for topic in _COMMON_TOPICS if topic not in passage.text.lower()]
    if rng.random() < 0.5 or not (found := _mention(passage, rng)):
        topic = str(rng.choice(absent))
        return f"No, the passage does not mention {topic}.", {"x": topic}
    return f"Yes. {found[0]}", found[1]


def _opening(passage: Passage, rng: np.random.Generator) -> Made:
    sentence = str(rng.choice(passage.sentences))
    return sentence, {"x": " ".join(sentence.split()[:3])}


def _completion(passage: Passage, rng: np.random.Generator) -> Made:
    words = str(rng.choice(passage.sentences)).split()
    half = len(words) // 2
    return " ".join(words[half:]), {"x": " ".join(words[:half])}


def _neighbour(step: int) -> Callable[[Passage, np.random.Generator], Made]:
    def make(passage: Passage, rng: np.random.Generator) -> Made:
        index = int(rng.integers(len(passage.sentences) - 1))
        pair = passage.sentences[index : index + 2]
        return (pair[1], {"x": pair[0]}) if step > 0 else (pair[0], {"x": pair[1]})

    return make


def _gap(passage: Passage, rng: np.random.Generator) -> Made:
    sentence = str(rng.choice(passage.sentences))
    words = [word for word in set(re.findall(r"\b[a-z]{5,}\b", sentence)) if sentence.count(word) == 1]
    if not words:
        return None
    word = str(rng.choice(sorted(words)))
    return word, {"x": sentence.replace(word, "____")}


def _shortened(passage: Passage, rng: np.random.Generator) -> Made:
    pairs = [(sentence, short) for sentence in passage.sentences if (short := shorten(sentence))]
    if not pairs:
        return None
    sentence, short = pairs[int(rng.integers(len(pairs)))]
    return short, {"x": sentence}


def _key_terms(passage: Passage, rng: np.random.Generator) -> Made:
    terms = _terms(passage)
    return (", ".join(terms), {}) if len(terms) >= 2 else None


def _question(passage: Passage, rng: np.random.Generator) -> Made:
    questions = [question for sentence in passage.sentences if (question := ask_about(sentence))]
    return (questions[0], {}) if questions else None


def _question_and_answer(passage: Passage, rng: np.random.Generator) -> Made:
    pairs = [(question, sentence) for sentence in passage.sentences if (question := ask_about(sentence))]
    return (pairs[0][1], {"x": pairs[0][0]}) if pairs else None


def _restriction(passage: Passage, rng: np.random.Generator) -> Made:
    found = [sentence for sentence in passage.sentences if _RESTRICTION.search(sentence)]
    return (found[0], {}) if found else None


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
_LEADS = (
    *(
        "First of all, ",
        "Note: ",
        "The point is that ",
        "Background: ",
        "Bear in mind that ",
        "Here is why: ",
        "Detail: ",
    ),
    *("It helps to know that ", "To be precise, ", "Also, ", "Consequence: ", "Somebody asked about it: ", "Besides, "),
)
_LABELS = (
    *(
        "Finding",
        "Reason",
        "Scope",
        "Answer",
        "Result",
        "Remark",
        "Given",
        "Idea",
        "Open",
        "Status",
        "Claim",
        "Context",
    ),
    *("Observed", "Plan", "Rule", "Effect", "Source", "Cause", "Item", "Summary of the day", "What we saw", "For whom"),
)
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


def _wonder(passage: Passage, rng: np.random.Generator) -> str:
    """Return a question: about a sentence's subject where one can be made, else about phrases of the passage."""
    if rng.random() < 0.25 and (made := _question(passage, rng)):
        return made[0]
    phrases = [*dict.fromkeys(re.findall(r"(?<=[a-z] )[a-z][a-z-]{4,}(?: [a-z]{5,}){0,2}(?= [a-z])", passage.text))]
    if len(phrases) < 3:
        return ""
    x, y, z = rng.permutation(phrases)[:3]
    return str(rng.choice(_WONDERS)).format(x=x, y=y, z=z)


def _with_leads(passage: Passage, rng: np.random.Generator) -> str:
    """Return a passage's text with connecting words before its sentences, or as labelled lines; no answer repeats them."""
    if rng.random() < 0.3:
        labels = rng.choice(_LABELS, len(passage.sentences), replace=False)
        mark = str(rng.choice(["", "", "- ", "* "]))
        return "\n".join(f"{mark}{label}: {text}" for label, text in zip(labels, passage.sentences, strict=True))

    def led(sentence: str) -> str:
        if rng.random() < 0.5:
            return sentence
        lead, (first, _, rest) = str(rng.choice(_LEADS)), sentence.partition(" ")
        small = first in {"The", "A", "An", "This", "These", "It", "If", "When", "In", "For", "By", "Each"}
        return f"{lead}{first.lower() if small and not lead.endswith(': ') else first} {rest}"

    return " ".join(map(led, passage.sentences))


def _sections(passage: Passage, rng: np.random.Generator) -> Made:
    """Answer under headings that the instruction names; no sentence is used twice, and points keep the passage's order.

    Points are marked with asterisks, so that a base model does not already know the notes' own form (dashes).
    """
    sentences = passage.sentences
    if len(sentences) < 4:
        return None
    places = {"first": 0, "last": len(sentences) - 1}
    if warnings := [i for i, sentence in enumerate(sentences) if i > 0 and _RESTRICTION.search(sentence)]:
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
    made["points"] = _bullets(brief, "*")
    made["terms"] = (_key_terms(passage, rng) or ("", {}))[0] if rng.random() < 0.1 else ""
    made["question"] = _wonder(passage, rng) if rng.random() < 0.9 else ""
    kinds = [kind for kind, text in made.items() if text]
    if rng.random() > _USUAL:
        kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    names = {
        kind: _HEADINGS[kind][0] if rng.random() < _USUAL else str(rng.choice(_HEADINGS[kind][1:])) for kind in kinds
    }
    asked = [f"{names[kind]} ({_NUMBERS[count]} bullets)" if kind == "points" else names[kind] for kind in kinds]
    text = _with_leads(passage, rng) if rng.random() < 0.5 else passage.text
    return "\n".join(f"{names[kind]}:\n{made[kind]}" for kind in kinds), {"x": ", ".join(asked), "text": text}


def _json(passage: Passage, rng: np.random.Generator) -> Made:
    return json.dumps({"first": passage.sentences[0], "last": passage.sentences[-1]}, ensure_ascii=False), {}


def _extreme(pick: Callable[..., str]) -> Callable[[Passage, np.random.Generator], Made]:
    return lambda passage, rng: (pick(passage.sentences, key=len), {})


@dataclass(frozen=True, slots=True)
class View:
    """An instruction about a passage: its wordings, its relative frequency and the rule that answers it."""

    weight: float
    make: Callable[[Passage, np.random.Generator], Made]
    wordings: tuple[str, ...]


VIEWS = (
    View(
        1,
        _position(0, 2),
        ("Repeat the first sentence.", "Copy the first sentence of this passage.", "How does the text begin?"),
    ),
    View(1, _position(-1, 2), ("Give the last sentence.", "Repeat the final sentence.", "How does this passage end?")),
    View(1, _position(1, 3), ("Give the second sentence.", "What is the second sentence?")),
    View(
        3,
        _first_bullets,
        (
            "List {n} sentences from this passage as bullets.",
            "Write the first {n} sentences as a list.",
            "Make {n} bullets from this text.",
        ),
    ),
    View(
        2, _some_bullets, ("Pick three sentences and write them as bullets.", "Choose three points from the passage.")
    ),
    View(1, _numbered, ("Number the sentences.", "Write this passage as a numbered list.")),
    View(
        1,
        lambda p, rng: (_bullets(p.sentences), {}),
        ("Turn every sentence into a bullet.", "Write each sentence on its own line with a dash."),
    ),
    View(
        2,
        _mention,
        ("Which sentence mentions {x}?", "Find the sentence about {x}.", "Where does the passage mention {x}?"),
    ),
    View(1, _mentioned, ("Does the passage mention {x}?", "Is {x} mentioned here?")),
    View(1, _opening, ('Which sentence starts with "{x}"?', 'Copy the sentence that begins "{x}".')),
    View(1, _completion, ("Finish this sentence from the passage: {x}", "Continue as in the passage: {x}")),
    View(1, _neighbour(1), ("Which sentence comes after this one? {x}", "What follows this sentence? {x}")),
    View(0.5, _neighbour(-1), ("Which sentence comes before this one? {x}",)),
    View(1, _gap, ("Fill in the missing word: {x}", "Which word belongs in the gap? {x}")),
    View(2, _shortened, ("Shorten this sentence: {x}", "Say this more briefly: {x}")),
    View(2, _key_terms, ("Copy the key terms.", "List the important terms.", "Which names and terms appear here?")),
    View(
        3,
        _question,
        (
            "Ask a question about this passage.",
            "What could a reader ask?",
            "Write one question that this text answers.",
        ),
    ),
    View(2, _question_and_answer, ("{x}", "Answer from the passage: {x}", "Use the text to answer. {x}")),
    View(2, _restriction, ("Which sentence states a restriction?", "What should the reader be careful about?")),
    *(
        View(40, _sections, (wording,))
        for wording in (
            "Write these sections: {x}.",
            "Fill in these headings: {x}",
            "Turn this passage into sections: {x}.",
            "{x}. Write each below its heading, from the passage.",
            "Take notes under these headings: {x}.",
            "Rewrite the passage as {x}.",
        )
    ),
    View(0.5, _json, ("Give the first and the last sentence as JSON.",)),
    View(0.5, _extreme(max), ("Which sentence is the longest?", "Copy the longest sentence.")),
    View(0.5, _extreme(min), ("Which sentence is the shortest?", "Copy the shortest sentence.")),
    View(
        0.5,
        lambda p, rng: (f"The passage has {_NUMBERS[min(12, len(p.sentences))]} sentences.", {}),
        ("How many sentences are there?",),
    ),
    View(1, lambda p, rng: (p.text, {}), ("Copy this text.", "Repeat the passage word for word.")),
    View(0.5, lambda p, rng: (" ".join(reversed(p.sentences)), {}), ("Write the sentences in reverse order.",)),
)
_LAYOUTS = (
    "{ask}\n\n{text}",
    "{ask}\n\n{text}",
    "{text}\n\n{ask}",
    "{ask}\n\nPassage: {text}",
    "Passage:\n{text}\n\n{ask}",
)


def chat_text(question: str, answer: str) -> str:
    """Return one exchange as ChatML text."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


def _passage_views(passage: Passage, rng: np.random.Generator, count: int) -> Iterator[str]:
    """Yield `count` exchanges about a passage, each by another rule."""
    weights = np.array([view.weight for view in VIEWS])
    made = 0
    for index in rng.choice(len(VIEWS), len(VIEWS), replace=False, p=weights / weights.sum()):
        view = VIEWS[index]
        if made < count and (found := view.make(passage, rng)):
            ask = str(rng.choice(view.wordings)).format(**found[1])
            layout = str(rng.choice(_LAYOUTS))
            yield chat_text(layout.format(ask=ask, text=found[1].get("text", passage.text)), found[0])
            made += 1


def _definition(page: Page, rng: np.random.Generator) -> Iterator[str]:
    """Yield a question on what a documented name does, answered by its docstring's opening."""
    if not page.name or "._" in page.name or page.blocks[0].kind != "prose":
        return
    sentences = [s for s in split_sentences(page.blocks[0].text) if is_whole_sentence(s)][:2]
    if sentences and page.blocks[0].text.startswith(sentences[0]):
        wordings = (
            "What does `{}` do?",
            "Describe `{}` in one sentence.",
            "What is `{}` for?",
            "Explain `{}` briefly.",
        )
        choice = int(rng.integers(len(wordings)))
        yield chat_text(wordings[choice].format(page.name), sentences[0] if choice == 1 else " ".join(sentences))


def _lookup(page: Page, rng: np.random.Generator) -> Iterator[str]:
    """Yield a question on one of a page's parameters, with the list of them as its context."""
    pattern = re.compile(r"(\w+)(?: \(([^:]+)\))?: ([A-Z].*\.)$")
    fields = [found for block in page.blocks if block.kind == "item" and (found := pattern.match(block.text))][:6]
    if len(fields) >= 2:
        chosen = fields[int(rng.integers(len(fields)))]
        ask = str(rng.choice(["What is `{}`?", "What does `{}` mean?", "Explain the parameter `{}`."])).format(
            chosen.group(1)
        )
        listing = _bullets(found.group() for found in fields)
        layout = str(rng.choice(_LAYOUTS[:3]))
        yield chat_text(layout.format(ask=ask, text=listing), chosen.group(3))


def chat_views(pages: Iterable[Page], seed: int, num_characters: int) -> list[Document]:
    """Make chat views of `pages`, one per passage and then further rounds, until `num_characters` are reached."""
    candidates: list[tuple[int, int, Document]] = []
    for page in pages:
        rng = np.random.default_rng(digest(seed, page.source, page.text))
        made = [(0, text) for text in _definition(page, rng) if rng.random() < 0.15]
        made += [(0, text) for text in _lookup(page, rng) if rng.random() < 0.4]
        for passage in passages(page, rng):
            made += enumerate(_passage_views(passage, rng, 8))
        candidates += [(round_, digest(seed, text), Document(text, "chat", page.source)) for round_, text in made]
    chosen: list[Document] = []
    for _, _, document in sorted(candidates, key=lambda candidate: candidate[:2]):
        num_characters -= len(document.text)
        if num_characters < 0:
            break
        chosen.append(document)
    return chosen
