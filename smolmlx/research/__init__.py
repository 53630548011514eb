"""The research API: ten typed questions to a tuned model about passages of a paper."""

from smolmlx.evals.parsers import QAPair, RetrievalResult, Triplet
from smolmlx.research.budget import PassageCut
from smolmlx.research.researcher import BatchResearcher, PaperResearcher

__all__ = ["BatchResearcher", "PaperResearcher", "PassageCut", "QAPair", "RetrievalResult", "Triplet"]
