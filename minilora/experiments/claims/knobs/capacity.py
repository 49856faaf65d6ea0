"""Claims about how much an adapter holds."""

from minilora.experiments.claims.claim import Claim

CLAIMS: list[Claim] = []
