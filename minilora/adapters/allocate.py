"""A budget of ranks, spread over the layers while they train: more where it matters (after AdaLoRA, Zhang et al. 2023).

Plain LoRA gives every layer the same rank. But an update is a sum of rank-one components, and components can be
compared across layers:

    ΔW = s · Σ_i b_i a_iᵀ        a_i the i-th row of A, b_i the i-th column of B

So training begins with more components than it may end with. Now and then the least important are set to zero, each
time fewer remain, and at the end the ranks of all layers add up to the budget.

The importance of a weight is |w · ∂L/∂w|, the loss that setting it to zero would cost to first order (section 3.2). A
component's is the mean importance over a_i plus the mean over b_i. One gradient knows one batch only, but Adam keeps
the running mean square v of all gradients: we take |w| · √v and hold no state of our own. The paper smooths |w · g|
itself, weighs it by its uncertainty, and keeps a diagonal of singular values with A and B nearly orthogonal.

A component whose b_i was set to zero can come back: its a_i is still there, so b_i still has a gradient. At the end
a_i is set to zero too, and then neither has a gradient.
"""

import re
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minilora.adapters.adapter import apply_adapter, extract_adapter
from minilora.adapters.inject import lora_layers, remove_lora
from minilora.lora import LoRALinear


class RankAllocator:
    """Give it to `train` as `after_step`, and call `shrink` when training is done.

    budget: ranks of all layers together at the end, at least one for each. Once every `every` steps the number falls,
    as 1 - (1 - t)³ (equation 12), from all ranks at step `start` to the budget at step `end`. Raises ValueError for a
    budget below the number of layers or above their ranks, for steps that do not follow each other, and for a model
    that started from PiSSA or OLoRA, because the starting product that is subtracted there keeps its rank.
    """

    def __init__(self, model: nn.Module, budget: int, start: int, end: int, every: int = 5):
        self.layers = dict(lora_layers(model))
        least, self.present = len(self.layers), sum(layer.r for layer in self.layers.values())
        if not least <= budget <= self.present:
            raise ValueError(f"the rank budget is {budget}; the layers need at least {least}, at most {self.present}")
        if any(layer.start_A is not None for layer in self.layers.values()):
            raise ValueError("ranks cannot move after a start from W, pissa or olora: B₀A₀, subtracted, keeps its rank")
        if not (0 <= start < end and every >= 1):
            raise ValueError(f"start {start}, end {end}, every {every}: 0 <= start < end and every >= 1 are needed")
        self.budget, self.start, self.end, self.every = budget, start, end, every

    def budget_at(self, step: int) -> int:
        """How many ranks may remain after so many steps."""
        t = min(max(step - self.start, 0) / (self.end - self.start), 1)
        return self.present - int((self.present - self.budget) * (1 - (1 - t) ** 3))

    @torch.no_grad()
    def __call__(self, step: int, optimizer: Optimizer):
        """Sets the least important components to zero, after `step` steps of the optimizer."""
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
    weights = layer.lora_A, layer.lora_B
    of_A, of_B = (weight.abs() * optimizer.state[weight]["exp_avg_sq"].sqrt() for weight in weights)
    return of_A.mean(1) + of_B.mean(0)  # (r, in) and (out, r)


def most_important(importance: dict[str, Tensor], budget: int) -> dict[str, Tensor]:
    """By layer, which components stay, (r,) bool: the best of every layer, and the best of all the rest."""
    ranked = [values.to("cpu", copy=True) for values in importance.values()]
    for values in ranked:
        values[values.argmax()] = torch.inf
    kept = torch.zeros(sum(map(len, ranked)), dtype=torch.bool)
    kept[torch.cat(ranked).topk(budget).indices] = True
    return dict(zip(importance, kept.split([len(values) for values in ranked]), strict=True))


def shrink(model: nn.Module) -> nn.Module:
    """Takes the components that are zero out of A and B: layers of different ranks, the same function.

    The ranks stand in the config's rank_pattern, and alpha_pattern keeps every layer's scaling. A layer of zeros keeps
    one component. Changes and returns the model; raises ValueError for a model without LoRA layers or a merged one.
    """
    adapter = extract_adapter(model)
    ranks, alphas = {}, {}
    for name in adapter.A:
        kept = adapter.B[name].any(0)  # (r,)
        kept[0] |= not kept.any()
        key, r = f"^{re.escape(name)}", int(kept.sum())  # ^: no layer whose name ends so
        ranks[key], alphas[key] = r, adapter.scaling(name) * (r**0.5 if adapter.config.use_rslora else r)
        adapter.A[name], adapter.B[name] = adapter.A[name][kept], adapter.B[name][:, kept]
    adapter.config = replace(adapter.config, rank_pattern=ranks, alpha_pattern=alphas)
    remove_lora(model)
    return apply_adapter(model, adapter)
