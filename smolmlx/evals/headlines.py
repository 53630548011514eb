"""The figures that decide, and what each is called: in the terminal, in results, in reports and on cards alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """How a figure is read."""

    key: str
    label: str
    meaning: str
    higher_is_better: bool = True
    share: bool = True
    """In [0, 1]."""
    yes_or_no: bool = False
    """Of one row it is 0 or 1, so that its mean reads as a percentage of rows."""


NOTES = (
    Metric("compliance", "strict compliance", "answers that keep to the task's template, by the strict rule", yes_or_no=True),
    Metric("content_alignment", "content alignment", "0.60 F1 + 0.25 key-term recall + 0.15 supported terms, against the reference"),
    Metric("f1", "reference F1", "content tokens shared with the reference"),
    Metric("key_term_recall", "key-term recall", "share of the reference's distinct terms that the answer names"),
    Metric("unsupported", "unsupported terms", "terms found neither in the input nor in the reference", higher_is_better=False),
    Metric("rubric", "rubric (0-12)", "length and specificity of the four sections", share=False),
)  # fmt: skip
"""Of suite notes; every other metric stands in the full table."""

RESEARCH = (
    Metric("valid", "valid", "answers that keep to their schema, of rows of lists and retrieval", yes_or_no=True),
    Metric("ended", "texts ended", "not empty and ended by themselves, of rows of texts", yes_or_no=True),
    Metric("index_accuracy", "index accuracy", "the passage that answers, or None where none does, of retrieval rows", yes_or_no=True),
    Metric("set_f1", "set F1", "items in common with the reference, of rows of lists"),
    Metric("rouge_l", "ROUGE-L", "F1 of the longest common subsequence, of all rows but retrieval"),
)  # fmt: skip
"""Of suite research."""

BY_KEY = {metric.key: metric for metric in (*NOTES, *RESEARCH)}
SUMMED_UP = ("compliance", "content_alignment", *(metric.key for metric in RESEARCH))
"""Metrics that are said in a sentence, and that settings of a sweep are compared in."""
FORM = ("compliance", "valid", "ended")
"""Of those, the ones that say nothing about content."""


def is_said(key: str, with_control: bool) -> bool:
    """Whether the terminal says a metric's difference in a sentence; what a stage adds that no text supports only beside the stage before."""
    return key in SUMMED_UP or (key == "unsupported" and not with_control)


def label(key: str) -> str:
    """Return what a metric is called in words."""
    return BY_KEY[key].label if key in BY_KEY else key.replace("_", " ")
