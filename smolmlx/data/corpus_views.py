"""Chat views of documentation, made by rule: they teach a tiny model the ChatML tokens and to copy from context."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from smolmlx.data.corpus_pages import (
    Document,
    Page,
    Passage,
    digest,
    is_whole_sentence,
    passages,
    split_sentences,
)
from smolmlx.data.corpus_sections import Made, ask_of_subject, sections
from smolmlx.data.corpus_sentences import (
    NUMBERS,
    RESTRICTION,
    ask_about,
    bullets,
    disguised,
    shorten,
    subject_of,
    terms_of,
)

_DISGUISED = 0.35
"""Share of the views whose passage names its subject by an invented name."""
_COMMON_TOPICS = (
    *("matrix", "thread", "socket", "image", "graph", "token", "timezone", "polynomial", "password", "directory"),
    *("gradient", "cache", "column", "calendar", "audio", "permutation", "decorator", "checksum", "quantile", "font"),
)


def _position(index: int, least: int) -> Callable[[Passage, np.random.Generator], Made]:
    return lambda passage, rng: (passage.sentences[index], {}) if len(passage.sentences) >= least else None


def _first_bullets(passage: Passage, rng: np.random.Generator) -> Made:
    count = int(rng.choice([2, 3, 3, 3]))
    return (bullets(passage.sentences[:count]), {"n": NUMBERS[count]}) if len(passage.sentences) >= count else None


def _some_bullets(passage: Passage, rng: np.random.Generator) -> Made:
    if len(passage.sentences) < 4:
        return None
    chosen = np.sort(rng.choice(len(passage.sentences), 3, replace=False))
    return bullets(passage.sentences[i] for i in chosen), {}


def _numbered(passage: Passage, rng: np.random.Generator) -> Made:
    return "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(passage.sentences, 1)), {}


def _mention(passage: Passage, rng: np.random.Generator) -> Made:
    holders = {term: [s for s in passage.sentences if term in s] for term in terms_of(passage)}
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
    terms = terms_of(passage)
    return (", ".join(terms), {}) if len(terms) >= 2 else None


def _question(passage: Passage, rng: np.random.Generator) -> Made:
    questions = [question for sentence in passage.sentences if (question := ask_about(sentence))]
    return (questions[0], {}) if questions else None


def _subject(passage: Passage, rng: np.random.Generator) -> Made:
    return (subject, {}) if (subject := subject_of(passage)) else None


def _subject_question(passage: Passage, rng: np.random.Generator) -> Made:
    return (asked, {}) if (asked := ask_of_subject(passage, rng)) else None


def _question_and_answer(passage: Passage, rng: np.random.Generator) -> Made:
    pairs = [(question, sentence) for sentence in passage.sentences if (question := ask_about(sentence))]
    return (pairs[0][1], {"x": pairs[0][0]}) if pairs else None


def _restriction(passage: Passage, rng: np.random.Generator) -> Made:
    found = [sentence for sentence in passage.sentences if RESTRICTION.search(sentence)]
    return (found[0], {}) if found else None


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
        lambda p, rng: (bullets(p.sentences), {}),
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
    View(
        2, _subject, ("What is this mostly about?", "Name the subject of the passage.", "Which phrase comes back most?")
    ),
    View(
        3,
        _subject_question,
        (
            "Ask a short question about its subject.",
            "Ask about the main subject of this passage.",
            "Ask one more thing.",
        ),
    ),
    View(2, _question_and_answer, ("{x}", "Answer from the passage: {x}", "Use the text to answer. {x}")),
    View(2, _restriction, ("Which sentence states a restriction?", "What should the reader be careful about?")),
    *(
        View(40, sections, (wording,))
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
        lambda p, rng: (f"The passage has {NUMBERS[min(12, len(p.sentences))]} sentences.", {}),
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
        if made == count:
            return
        told = disguised(passage, rng) if rng.random() < _DISGUISED else passage
        if found := view.make(told, rng):
            ask = str(rng.choice(view.wordings)).format(**found[1])
            layout = str(rng.choice(_LAYOUTS))
            yield chat_text(layout.format(ask=ask, text=found[1].get("text", told.text)), found[0])
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
        listing = bullets(found.group() for found in fields)
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
