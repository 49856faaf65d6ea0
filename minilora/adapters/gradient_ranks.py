"""Ranks chosen before training, from one backward pass: more where the loss is steep, none where it is flat.

Let G = ∂L/∂W be a layer's gradient, with singular values σ_1 ≥ σ_2 ≥ ... Of all ΔW of rank r and of one size, the one
along G's first r directions lowers the loss most, to first order:

    ΔW = -η Σ_i σ_i u_i v_iᵀ        L(W + ΔW) - L(W) ≈ ⟨G, ΔW⟩ = -η Σ_i σ_i²        i = 1 ... r

Over all layers a step at rate η gains the sum of the chosen σ_i², and a step of given size the root of that sum: both
want the same components. One costs in + out numbers. So components are taken by σ_i² / (in + out), the largest first,
until a budget of numbers is spent. A layer's rank is how many of its own were taken; with none it gets no adapter.

What this leaves out: Adam, which scales each number's step; A, which starts at random and not along G, as in LoRA-GA
(Wang et al. 2024); and that G changes while training. GoRA (He et al. 2025) chooses by mean |w · ∂L/∂w|, also before.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.adapters.inject import find_targets, linear_layers, lora_layers
from minilora.config import LoRAConfig
from minilora.modes import in_eval_mode
from minilora.train import forward, next_token_targets
from minilora.train_settings import IGNORE

Pairs = Iterable[tuple[Tensor, Tensor]]  # input_ids and labels of each batch, (B, T)


def gradient_ranks(
    model: nn.Module, batches: Pairs, budget: int, target_modules: Sequence[str] | str = "all-linear"
) -> dict[str, int]:
    """By full name, the ranks of those layers that should get an adapter: see `with_ranks`. budget: how many numbers
    may be trained. Raises ValueError as `gradient_energies` and `spend`."""
    costs = {name: layer.in_features + layer.out_features for name, layer in linear_layers(model).items()}
    return spend(gradient_energies(model, batches, target_modules), costs, budget)


def gradient_energies(
    model: nn.Module, batches: Pairs, target_modules: Sequence[str] | str = "all-linear"
) -> dict[str, Tensor]:
    """By full name, σ_i² of ∂L/∂W from the largest on, (min(in, out),) float64 on the CPU.

    L is the mean over all tokens that count. A gradient is dropped once its σ_i² are known: with one batch there is
    never more than one, with several all wait for the last. The model is left without any. Raises ValueError for LoRA
    layers, targets without a match, weights in 4 bits, no token that counts, and a gradient that is not finite.
    """
    if any(lora_layers(model)):
        raise ValueError("the model already has LoRA layers; ranks are chosen on a plain model")
    layers = linear_layers(model)
    names = find_targets(list(layers), target_modules)
    if coded := [name for name in names if not hasattr(layers[name], "weight")]:
        raise ValueError(f"{coded[0]} is in 4 bits, and codes have no gradient; choose ranks on the base in floats")
    device = next(model.parameters()).device
    pairs = [(ids.to(device), next_token_targets(labels).to(device)) for ids, labels in batches]
    if not (counted := sum(int((targets != IGNORE).sum()) for _, targets in pairs)):
        raise ValueError("no token of the batches counts in the loss, so there is no gradient")
    before, hooks = {p: p.requires_grad for p in model.parameters()}, []
    energies: dict[str, Tensor] = {}
    model.requires_grad_(False).zero_grad(set_to_none=True)
    try:
        with in_eval_mode(model):
            for name in names:
                layers[name].weight.requires_grad_(True)
            for left, (ids, targets) in zip(reversed(range(len(pairs))), pairs, strict=True):
                for name in () if left else names:  # the last backward pass completes the sums over batches
                    hooks.append(layers[name].weight.register_post_accumulate_grad_hook(partial(keep, name, energies)))
                where = (targets != IGNORE).nonzero(as_tuple=True)
                logits = forward(model, ids, where, "float32")  # (N, V)
                (F.cross_entropy(logits, targets[where], reduction="sum") / counted).backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
        model.zero_grad(set_to_none=True)
    return {name: energies[name] for name in names}


def keep(name: str, energies: dict[str, Tensor], weight: Any):
    """σ_i², the eigenvalues of G Gᵀ, which a GPU finds faster than an SVD. G is dropped."""
    G, weight.grad = weight.grad, None
    if not G.isfinite().all():
        raise ValueError(f"the gradient of {name} is not finite")
    G = G.to("cpu" if G.device.type == "mps" else G.device).double()  # MPS has no float64
    G = G if len(G) <= G.shape[1] else G.T  # the shorter side
    energies[name] = torch.linalg.eigvalsh(G @ G.T).flip(0).clamp(min=0).cpu()


def spend(energies: Mapping[str, Tensor], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """The ranks, without zeros. costs: numbers of a component. ValueError for a budget that is below every cost."""
    if budget < (least := min(costs[name] for name in energies)):
        raise ValueError(f"the budget is {budget} numbers, and a component of the smallest layer has {least}")
    gains = sorted(((gain / costs[name], name) for name in energies for gain in energies[name].tolist()), reverse=True)
    ranks = dict.fromkeys(energies, 0)
    for _, name in gains:
        if costs[name] <= budget:
            ranks[name], budget = ranks[name] + 1, budget - costs[name]
    return {name: r for name, r in ranks.items() if r}


def with_ranks(config: LoRAConfig, ranks: Mapping[str, int]) -> LoRAConfig:
    """The config for layers of these ranks, each with the scaling that `config` has: its alpha goes with its rank."""
    power = 0.5 if config.use_rslora else 1
    pattern = {f"^{re.escape(name)}": r for name, r in ranks.items()}  # ^: the whole name, and not its end
    alphas = {key: config.lora_alpha * (r / config.r) ** power for key, r in pattern.items()}
    return replace(config, target_modules=list(ranks), rank_pattern=pattern, alpha_pattern=alphas)
