"""Rules over the sentences of a passage: its terms, its subject, questions, shorter wordings, invented names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from smolmlx.data.corpus_pages import WORD, Passage

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
RESTRICTION = re.compile(r"\b(?:not|only|cannot|must|never|unless|except|without|no longer)\b")
"""Marks a sentence that limits something."""
_PLAINWORDS = frozenset(
    {"True", "False", "None", "If", "The", "should", "before", "return", "returns", "because", "whether"}
)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def terms_of(passage: Passage) -> list[str]:
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


def bullets(sentences: Iterable[str], mark: str = "-") -> str:
    return "\n".join(f"{mark} {sentence}" for sentence in sentences)


_FUNCTION_WORDS = re.compile(
    r"(?:a|about|after|all|also|an|and|any|are|as|at|be|because|been|before|but|by|can|each|else|few|first|for|"
    r"from|has|have|how|if|in|into|is|it|its|like|made|make|many|may|more|most|must|no|not|of|on|one|only|or|"
    r"other|over|same|see|set|should|since|so|some|such|than|that|the|their|them|then|there|these|they|this|"
    r"those|to|two|under|unless|until|use|used|uses|using|via|was|were|what|when|where|whether|which|while|who|"
    r"will|with|within|without|would|you|your)"
)


def subject_of(passage: Passage) -> str | None:
    """Return the phrase of one to three words that a passage repeats most, longer ones first, or None."""
    counts: Counter[tuple[str, ...]] = Counter()
    for sentence in passage.sentences:
        words = [word.strip(",.;:()") for word in sentence.split()]
        for n in (1, 2, 3):
            for i in range(len(words) - n + 1):
                run = tuple(words[i : i + n])
                if (
                    all(re.fullmatch(r"[a-z][a-z-]{2,}", w) and not _FUNCTION_WORDS.fullmatch(w) for w in run)
                    and len(run[-1]) > 3
                ):
                    counts[run] += 1
    repeated = [(count * len(run), len(run), run) for run, count in counts.items() if count > 1]
    return " ".join(max(repeated)[2]) if repeated else None


_ONSETS = (
    *("b", "br", "d", "f", "fl", "g", "gr", "h", "k", "kl", "l", "m", "n", "p", "pr", "r", "s", "st", "t", "tr"),
    *("v", "w", "z"),
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_CODAS = ("", "", "l", "n", "r", "s", "t", "nd", "rk", "m", "sh")
_PLAIN_NAMES = (
    *("north", "paper", "ladder", "silver", "winter", "garden", "double", "reverse", "bridge", "hollow", "copper"),
    *("slow", "river", "signal", "corner", "shadow", "linear", "middle", "border", "engine", "window", "market"),
    *("sample", "pocket", "timber", "rotation", "adaptation", "selection", "estimation", "training", "matching"),
    *("sharing", "drift", "pruning", "voting"),
)


def invented_name(rng: np.random.Generator) -> str:
    """Return a name of one to three words that no text holds: what is copied then cannot be remembered."""

    def word() -> str:
        if rng.random() < 0.4:
            return str(rng.choice(_PLAIN_NAMES))
        return "".join(
            str(rng.choice(part)) for _ in range(int(rng.integers(2, 4))) for part in (_ONSETS, _VOWELS, _CODAS)
        )

    words = [word() for _ in range(int(rng.choice([1, 2, 2, 3])))]
    if len(words) > 1 and rng.random() < 0.2:
        words[:2] = ["-".join(words[:2])]
    return " ".join(words)


def disguised(passage: Passage, rng: np.random.Generator) -> Passage:
    """Return a passage whose subject, and sometimes another word, goes by an invented name throughout."""
    sentences = passage.sentences
    others = sorted(
        {w for w in re.findall(r"(?<=[a-z] )[a-z]{6,}(?= [a-z])", passage.text) if not _FUNCTION_WORDS.fullmatch(w)}
    )
    olds = [subject_of(passage), str(rng.choice(others)) if others and rng.random() < 0.5 else None]
    for old in dict.fromkeys(old for old in olds if old):
        new = invented_name(rng)
        sentences = tuple(re.sub(rf"\b{re.escape(old)}\b", new, sentence) for sentence in sentences)
        opening = old[:1].upper() + old[1:]
        sentences = tuple(re.sub(rf"^{re.escape(opening)}\b", new[:1].upper() + new[1:], s) for s in sentences)
    return Passage(passage.page, sentences)
