"""Preference pairs: log-probabilities of both answers behind a prompt that is computed once, and their loss.

TRL's DPOTrainer is not used for this: it adds a second adapter as the reference, makes the reference's log-probabilities
anew in every run, computes each prompt twice and tokenizes by itself. TRL still owns the loop (see trainer.py).

B pairs, P tokens of a prefix, A tokens of a tail, S supervised positions, D width.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid
from transformers import DynamicCache

from smolmlx.data.pair_batches import PairBatch
from smolmlx.preferences import Ops, Pairs, pair_losses
from smolmlx.recipe import Dpo
from smolmlx_cuda.model import Losses

OPS = Ops(
    log_sigmoid=logsigmoid,
    log1m_exp=lambda x: torch.log(-torch.expm1(x.clamp(max=-1e-7))),
    clip_at_zero=torch.relu,
)


class PairLosses:
    """Summed loss of a micro-batch of pairs, and the log-probabilities it is made of."""

    def __init__(self, losses: Losses, how: Dpo) -> None:
        self.losses, self.how = losses, how

    def totals(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sum over the pairs, log-probabilities [2B]); `inputs` as made by `to_inputs`."""
        found = self.log_probs(inputs)
        columns = (found, inputs["reference"], inputs["tokens"])
        pairs = Pairs(*(array[side::2] for array in columns for side in (0, 1)))
        return (pair_losses(self.how, OPS, pairs) * inputs["real"]).sum(), found.detach()

    def log_probs(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the log-probability of each row's supervised tokens, [2B], nats."""
        hidden = self._hidden(inputs)
        nats, _ = self.losses.score(hidden.reshape(-1, hidden.shape[-1])[inputs["index"]], inputs["labels"])
        empty = torch.zeros(len(inputs["tails"]), device=nats.device, dtype=nats.dtype)
        return empty.index_add(0, inputs["owners"], -nats * inputs["weights"])

    def _hidden(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return [2B, A, D]."""
        tails = inputs["tails"]
        if "prefix" not in inputs:
            return self.losses.body(input_ids=tails, use_cache=False)
        prefix, starts = inputs["prefix"], inputs["starts"]
        place = torch.arange(prefix.shape[1], device=prefix.device)
        real = (place >= starts[:, None]).long()  # [B, P]
        cache = DynamicCache()
        positions = (place - starts[:, None]).clamp(min=0)
        self.losses.body(input_ids=prefix, attention_mask=real, position_ids=positions, past_key_values=cache, use_cache=True)  # fmt: skip
        # What the layers keep of a prompt is differentiable, so gradients of both answers reach it.
        cache.batch_repeat_interleave(2)
        seen = torch.cat([real.repeat_interleave(2, 0), torch.ones_like(tails)], dim=1)  # [2B, P+A]
        lengths = (prefix.shape[1] - starts).repeat_interleave(2)
        behind = lengths[:, None] + torch.arange(tails.shape[1], device=tails.device)
        return self.losses.body(input_ids=tails, attention_mask=seen, position_ids=behind, past_key_values=cache, use_cache=True)  # fmt: skip


def to_inputs(batch: PairBatch) -> dict[str, torch.Tensor]:
    """Return the tensors of a micro-batch; the prefix only where prompts are shared."""
    found = {
        name: torch.from_numpy(getattr(batch, name)).long() for name in ("pairs", "tails", "index", "labels", "owners")
    }
    found |= {"weights": torch.from_numpy(batch.weights), "real": torch.from_numpy(batch.real)}
    found["tokens"] = torch.from_numpy(batch.num_tokens)
    found["reference"] = torch.zeros(len(batch.tails))
    if batch.prefix.shape[1]:
        found |= {name: torch.from_numpy(getattr(batch, name)).long() for name in ("prefix", "starts")}
    return found
