"""Claims about variants on more than one task, and bases in few bits."""

from minilora.experiments.claims.claim import Claim

CLAIMS: list[Claim] = []
