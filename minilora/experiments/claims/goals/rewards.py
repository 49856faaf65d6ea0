"""Claims about rewards: policy gradients on adapters."""

from minilora.experiments.claims.claim import Claim

CLAIMS: list[Claim] = []
