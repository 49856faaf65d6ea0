"""A budget of ranks, spread over the layers while they train: more where it matters (after AdaLoRA, Zhang et al. 2023).

Plain LoRA gives every layer the same rank. But its update is a sum of rank-one components,

    ΔW = s · Σ_i b_i a_iᵀ        a_i the i-th row of A, b_i the i-th column of B

and they can be compared across layers. So training begins with more of them than it may end with; now and then the
least important are set to zero, fewer remain each time, and at the end the ranks that are left add up to the budget.

The importance of a weight is |w · ∂L/∂w|, the loss that setting it to zero would cost to first order (section 3.2);
of a component, the mean of that over a_i plus the mean over b_i. A gradient is that of one batch; Adam keeps the
running mean square v of the gradients, so we take |w| · √v and hold no state of our own. The paper smooths |w · g|
itself, weighs it by its uncertainty, and keeps a diagonal of singular values with A and B nearly orthogonal; this is
the idea without those.

A component whose b_i was set to zero can come back: its a_i is still there, so b_i still has a gradient. At the end
a_i goes too, and then neither has one.
"""

import re
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minilora.adapters.inject import Adapter, apply_adapter, extract_adapter, lora_layers, remove_lora
from minilora.lora import LoRALinear


class RankAllocator:
    """Give it to `train` as `after_step`, and call `shrink` when training is done.

    budget: ranks of all layers together at the end, at least one for each. The number falls from all there are, after
    step `start`, to the budget, at step `end`, as 1 - (1 - t)³ (equation 12), once every `every` steps. Raises
    ValueError for a budget that is below the number of layers or above the ranks there are, and for steps that do
    not follow each other.
    """

    def __init__(self, model: nn.Module, budget: int, start: int, end: int, every: int = 5):
        self.layers = dict(lora_layers(model))
        self.present = sum(layer.r for layer in self.layers.values())
        if not len(self.layers) <= budget <= self.present:
            raise ValueError(
                f"the rank budget is {budget}; it must be at least {len(self.layers)}, one for each LoRA layer, and at "
                f"most {self.present}, the ranks of the model"
            )
        if not (0 <= start < end and every >= 1):
            raise ValueError(f"start {start}, end {end}, every {every}: 0 <= start < end and every >= 1 are needed")
        self.budget, self.start, self.end, self.every = budget, start, end, every

    def budget_at(self, step: int) -> int:
        t = min(max(step - self.start, 0) / (self.end - self.start), 1)
        return self.present - int((self.present - self.budget) * (1 - (1 - t) ** 3))

    @torch.no_grad()
    def __call__(self, step: int, optimizer: Optimizer):
        """`step` optimizer steps have been taken. Sets the least important components to zero."""
        if step != self.end and (not self.start < step < self.end or step % self.every):
            return
        importance = {name: component_importance(layer, optimizer) for name, layer in self.layers.items()}
        for name, kept in most_important(importance, self.budget_at(step)).items():
            A, B = self.layers[name].lora_A, self.layers[name].lora_B
            B[:, ~kept] = 0
            if step == self.end:
                A[~kept] = 0
                for moment in ("exp_avg", "exp_avg_sq"):  # or their momentum would move them once more
                    optimizer.state[A][moment][~kept] = 0
                    optimizer.state[B][moment][:, ~kept] = 0


def component_importance(layer: LoRALinear, optimizer: Optimizer) -> Tensor:
    """mean |a_i| √v + mean |b_i| √v of every component of a layer, (r,)."""
    of_A, of_B = (
        weight.abs() * optimizer.state[weight]["exp_avg_sq"].sqrt() for weight in (layer.lora_A, layer.lora_B)
    )
    return of_A.mean(1) + of_B.mean(0)  # (r, in) and (out, r)


def most_important(importance: dict[str, Tensor], budget: int) -> dict[str, Tensor]:
    """By layer, which components stay, (r,) bool: the best of every layer, and the best of all the rest."""
    ranked = {name: values.clone() for name, values in importance.items()}
    for values in ranked.values():
        values[values.argmax()] = torch.inf
    kept = torch.zeros(sum(map(len, ranked.values())), dtype=torch.bool)
    kept[torch.cat([values.cpu() for values in ranked.values()]).topk(budget).indices] = True
    pieces = kept.split([len(values) for values in ranked.values()])
    return {name: piece.to(ranked[name].device) for name, piece in zip(ranked, pieces, strict=True)}


def shrink(model: nn.Module) -> nn.Module:
    """Takes the components that are zero out of A and B: layers of different ranks, the same function.

    The ranks stand in the config's rank_pattern, and alpha_pattern keeps every layer's scaling. A layer of zeros keeps
    one component. Changes and returns the model; raises ValueError for one without LoRA layers, or merged.
    """
    adapter = extract_adapter(model)
    config, ranks, alphas = adapter.config, {}, {}
    for name in adapter.A:
        kept = adapter.B[name].any(0)  # (r,)
        kept[0] |= not kept.any()
        scaling = adapter.scaling(name)
        adapter.A[name], adapter.B[name] = adapter.A[name][kept], adapter.B[name][:, kept]
        ranks[re.escape(name)] = r = int(kept.sum())
        alphas[re.escape(name)] = scaling * (r**0.5 if config.use_rslora else r)
    remove_lora(model)
    config = replace(config, rank_pattern=ranks, alpha_pattern=alphas)
    return apply_adapter(model, Adapter(config, adapter.A, adapter.B, adapter.magnitude))
