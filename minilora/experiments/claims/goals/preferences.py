"""Claims about preferences: DPO on adapters."""

from minilora.experiments.claims.claim import Claim

CLAIMS: list[Claim] = []
