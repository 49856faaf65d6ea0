"""Claims about ranks and layers chosen by a program."""

from minilora.experiments.claims.claim import Claim

CLAIMS: list[Claim] = []
