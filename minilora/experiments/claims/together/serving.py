"""Claims about many adapters served from one base, at the size of a real model."""

from minilora.experiments.claims.claim import Claim

CLAIMS: list[Claim] = []
