"""Claims about the rank and the layers."""

from minilora.experiments.claims.claim import Claim

CLAIMS: list[Claim] = []
