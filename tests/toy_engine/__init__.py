"""A third engine, in numpy alone: proof that an engine is a folder and an entry point, with no edit under smolmlx/.

Its model is a bigram: the next token depends on the present one, through the base model's embeddings and all of its
linear layers, each with the adapter that the plan gives it. It knows no attention, so its answers are nonsense; what it
keeps is the contract: batches, masks, learning rates, first weights, checkpoints, evaluation, refusals.
"""

from toy_engine.engine import ToyBackend

backend = ToyBackend()
__all__ = ["backend"]
