"""Claims about the learning rate, the batch and the scale."""

from minilora.experiments.claims.claim import Claim

CLAIMS: list[Claim] = []
