"""Claims about several devices: the bytes that training sends between them."""

from minilora.experiments.claims.claim import Claim

CLAIMS: list[Claim] = []
