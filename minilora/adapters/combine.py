"""Several adapters of one base made into one adapter, with weights: skills added, or one taken away (w < 0).

Each adapter is a change of weight, so a sum of adapters is a sum of changes, layer by layer:

    ΔW = Σ w_i s_i B_i A_i = [w_1 s_1 B_1 | w_2 s_2 B_2 | ...] · [A_1 ; A_2 ; ...]

The right-hand side is `concatenate`: B's beside each other, A's under each other, scale and weight inside B. It is the
sum exactly, at rank R = Σ r_i. `truncate` goes back to a small rank: it keeps the r largest singular values of the sum,
and no matrix of rank r is closer (Eckart and Young 1936). Adding the A's and adding the B's is something else:

    (B_1 + B_2)(A_1 + A_2) = B_1 A_1 + B_2 A_2 + B_1 A_2 + B_2 A_1

The last two terms belong to neither adapter. A and B mean nothing apart: for any invertible M, (B M)(M⁻¹ A) is the same
adapter with other cross terms.

Adapters trained apart may also disturb each other: small entries of one blur large entries of another, and opposite
signs cancel. Two remedies work on the entries of ΔW, so both need ΔW whole and give up the low rank:

    ties    (Yadav et al. 2023) keep the largest entries of each, elect a sign for every entry, average those that agree
    dare    (Yu et al. 2023) drop entries at random and scale up the rest: the sum stays right on average, and few
            entries of one adapter meet an entry of another

Both come back to rank r by SVD, and report how much of ΔW was lost: often much, because the result is not low-rank.
PEFT's `add_weighted_adapter` calls these "ties_svd" and "dare_linear_svd", the truncation "svd", and the concatenation
"cat". Its "linear", "ties" and "dare_linear" do the same to the A's and to the B's: the cross terms above come along.

Letters in the shape comments: in and out the layer's features, n adapters, r_i the rank of one, R of all together.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import reduce
from statistics import mode

import torch
from torch import Tensor

from minilora.adapters.adapter import Adapter
from minilora.config import LoRAConfig
from minilora.ranges import RANK

Factors = tuple[Tensor, Tensor]  # B (out, r) and A (r, in), float64, scale and weight inside B
Truncated = tuple[Adapter, dict[str, float]]  # an adapter, and by layer the share of ΔW that its rank misses


def concatenate(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Σ w_i ΔW_i exactly, at the sum of the ranks of those adapters that have the layer.

    Raises ValueError for no adapters, DoRA adapters, weights missing or not finite, and layers whose shapes differ.
    """
    return _adapter({name: _stacked(parts) for name, parts in _weighted(adapters, weights).items()}, adapters)


def truncate(adapters: Sequence[Adapter], weights: Sequence[float], r: int) -> Truncated:
    """The best adapter of rank r for Σ w_i ΔW_i, and by layer its relative error, ‖ΔW - BA‖ / ‖ΔW‖ (Frobenius).

    The sum is never formed: with B = Q_b R_b and Aᵀ = Q_a R_a, its singular values are those of R_b R_aᵀ, which is
    R x R. Where the sum has a smaller rank than r, so has the layer's adapter, and the error is zero. Raises what
    `concatenate` raises, and ValueError for an r below 1.
    """
    RANK.check("r", r)
    factors, errors = {}, {}
    for name, parts in _weighted(adapters, weights).items():
        B, A = _stacked(parts)
        (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B), torch.linalg.qr(A.T)
        noise = torch.finfo(B.dtype).eps * len(Rb) * Rb.norm() * Ra.norm()  # left of adapters that cancel
        (b, a), errors[name] = _best(Rb @ Ra.T, r, noise)
        factors[name] = Qb @ b, a @ Qa.T
    return _adapter(factors, adapters), errors


def ties(adapters: Sequence[Adapter], weights: Sequence[float], density: float, r: int) -> Truncated:
    """Trim, elect, average: the adapter of rank r, and by layer its relative error, as in `truncate`.

    Of each w_i ΔW_i the share `density` stays, the entries of largest magnitude, at least one. The sum of the entries
    that stayed at a place elects the sign there. The value is the paper's disjoint mean: the sum of the entries of that
    sign, over their number; opposed and trimmed entries, absent layers and weights of zero do not count. Equal weights
    are the paper's λ. The result is a mean already: for n adapters the plain choice is weights of 1, not 1/n. Raises
    what `truncate` raises, and ValueError for a density outside (0, 1].
    """

    return _by_entries(adapters, weights, density, r, lambda deltas: elect(trim(deltas, density)))


def dare(
    adapters: Sequence[Adapter], weights: Sequence[float], density: float, r: int, seed: int = 0, signs: bool = False
) -> Truncated:
    """Drop and rescale: the adapter of rank r, and by layer its relative error, as in `truncate`.

    Every entry of every ΔW_i is kept with probability `density` and then divided by `density`, or becomes zero; the
    result is the weighted sum. The same seed drops the same entries. signs: TIES on what was kept, with its election
    and its mean in place of the sum (PEFT's "dare_ties"). Raises what `ties` raises.
    """
    generator = torch.Generator().manual_seed(seed)

    def merge(deltas: Tensor) -> Tensor:
        kept = drop(deltas, density, generator)
        return elect(kept) if signs else kept.sum(0)

    return _by_entries(adapters, weights, density, r, merge)


def prune(adapters: Sequence[Adapter], weights: Sequence[float], density: float, r: int) -> Truncated:
    """The sum of each one's largest entries, the share `density` (PEFT's "magnitude_prune"): TIES without an election.

    The adapter of rank r, and by layer its relative error, as in `truncate`. Raises what `ties` raises.
    """
    return _by_entries(adapters, weights, density, r, lambda deltas: trim(deltas, density).sum(0))


# What is done to the entries of one layer's ΔW_i, weighted, in a stack (n, out, in).


def trim(deltas: Tensor, density: float) -> Tensor:
    """Zero but for the share `density` of each one's entries that is largest in magnitude, at least one."""
    flat = deltas.flatten(1)  # (n, out·in)
    largest = flat.abs().topk(max(1, round(density * flat.shape[1])), dim=1).indices
    return torch.zeros_like(flat).scatter_(1, largest, flat.gather(1, largest)).view_as(deltas)


def drop(deltas: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry kept with probability `density` and divided by it, or zero. generator: on the CPU, for any device."""
    kept = torch.rand(deltas.shape, generator=generator) < density
    return deltas * kept.to(deltas.device) / density


def elect(deltas: Tensor) -> Tensor:
    """The sum over all elects each entry's sign, and those that have it are averaged: (out, in)."""
    agree = deltas.sign() == deltas.sum(0).sign()  # where the sum is 0, zeros may agree: their mean is 0 as well
    return (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)


def _by_entries(adapters, weights, density: float, r: int, merge: Callable[[Tensor], Tensor]) -> Truncated:
    """`merge` on the weighted deltas (n, out, in) of each layer, then rank r. Only one layer's are held at a time."""
    RANK.check("r", r)
    if not 0 < density <= 1:
        raise ValueError(f"density is {density!r}; it must be a share of the entries above 0 and at most 1")
    factors, errors = {}, {}
    for name, parts in _weighted(adapters, weights).items():
        factors[name], errors[name] = _best(merge(torch.stack([B @ A for B, A in parts])), r)
    return _adapter(factors, adapters), errors


def _weighted(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[Factors]]:
    """By layer, in the order of first appearance, w_i s_i B_i and A_i of each adapter that has it."""
    if not adapters:
        raise ValueError("there are no adapters to combine; at least one is needed")
    if len(adapters) != len(weights):
        raise ValueError(f"there are {len(adapters)} adapters and {len(weights)} weights; each adapter needs one")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"the weights are {list(weights)!r}; they must be finite numbers")
    if any(adapter.magnitude for adapter in adapters):
        raise ValueError("DoRA adapters cannot be combined: their magnitudes scale W, and are no update to add")
    layers: dict[str, list[Factors]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, A in adapter.A.items():
            B = weight * adapter.scaling(name) * adapter.B[name].double()
            layers.setdefault(name, []).append((B, A.double()))
    for name, parts in layers.items():
        first, *others = dict.fromkeys(f"{A.shape[1]} to {len(B)}" for B, A in parts)
        if others:
            raise ValueError(f"{name} is of {first} features in one adapter and of {others[0]} in another: two bases")
    return layers


def _stacked(parts: list[Factors]) -> Factors:
    """B (out, R) and A (R, in)."""
    return torch.cat([B for B, _ in parts], 1), torch.cat([A for _, A in parts], 0)


def _best(delta: Tensor, r: int, noise: float | Tensor = 0.0) -> tuple[Factors, float]:
    """The nearest B A of rank r or below, and its relative error. Singular values up to `noise` count as zero."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    S = S.where(S > noise, 0)
    root = S[:r].sqrt()  # for each side
    error = (S[r:].norm() / S.norm()).item() if S.any() else 0.0
    return (U[:, :r] * root, root[:, None] * Vh[:r]), error


def _adapter(factors: dict[str, Factors], adapters: Sequence[Adapter]) -> Adapter:
    """The factors with a config that describes them, scaled by 1; in their widest dtype, float32 at least."""
    dtypes = (tensor.dtype for adapter in adapters for part in (adapter.A, adapter.B) for tensor in part.values())
    dtype = reduce(torch.promote_types, dtypes, torch.float32)
    ranks = {name: len(A) for name, (_, A) in factors.items()}
    r = mode(ranks.values())  # the most common one; layers of another rank are named, each as a whole
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    config = LoRAConfig(r, r, target_modules=list(ranks), rank_pattern=others, alpha_pattern=dict(others))
    return Adapter(config, *({name: part[i].to(dtype) for name, part in factors.items()} for i in (1, 0)))
