"""Claims about teachers: distillation into adapters."""

from minilora.experiments.claims.claim import Claim

CLAIMS: list[Claim] = []
