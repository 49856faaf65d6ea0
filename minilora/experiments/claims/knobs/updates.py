"""Claims about what an update looks like."""

from minilora.experiments.claims.claim import Claim

CLAIMS: list[Claim] = []
