"""Claims about adapters merged into one: what a sum costs each task, and what predicts it."""

from minilora.experiments.claims.claim import Claim

CLAIMS: list[Claim] = []
