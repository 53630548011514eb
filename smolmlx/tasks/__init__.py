"""The research tasks: their wording, their schemas, and how answers are read; one registry for data, API and scores."""

MADE = ("bullets", "qa", "rephrase", "continuation", "triplets", "retrieval", "comparison")
"""The seven tasks that `data augment` makes from chunks when none is named."""
ON_REQUEST = ("notes",)
"""Made from chunks too, when named; all other tasks are taken from answers of these."""
