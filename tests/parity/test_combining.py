"""Adapters put together, held against PEFT's `add_weighted_adapter`; and where it means something else, what it means.

PEFT's "cat" is our `concatenate`, and of its names that end in "_svd", which work on ΔW, "svd" is `truncate`, and
"ties_svd", "magnitude_prune_svd", "dare_linear_svd" and "dare_ties_svd" are `ties`, `prune` and `dare`. Two things
differ. Under unequal weights PEFT elects signs before it weighs, and we after, for the weights that were asked for. And
its names without "_svd" ("linear", "ties", ...) add, trim or drop the entries of A and of B apart, with √(w s): the
product has terms B_i A_j that belong to neither adapter, so it is no sum of the updates.
"""

import math

import pytest
import torch

from minilora.adapters.adapter import Adapter
from minilora.adapters.combine import concatenate, dare, drop, prune, ties, trim, truncate
from minilora.config import LoRAConfig

REASON = "held against transformers, peft and bitsandbytes, which `pip install -e '.[parity]'` installs"
peft = pytest.importorskip("peft", reason=REASON)

NAMES = ["a", "b", "c"]
DENSITY = 0.5  # of an even number of entries: both round it alike
EQUAL, UNEQUAL = [0.7, 0.7, 0.7], [0.5, 1.0, 2.5]
RANK = 5


@pytest.fixture
def theirs(llama):
    """A model in float64 with three random adapters of rank 4, each with an alpha of its own."""
    configs = [peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "down_proj"]) for alpha in (2, 4, 8)]
    model = peft.get_peft_model(llama(torch.float64), configs[0], adapter_name=NAMES[0])
    for name, config in zip(NAMES[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return model


def layers_of(model):
    found = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert len(found) == 4, list(found)
    return found


def ours_of(model, name):
    """The same adapter here."""
    layers = layers_of(model)
    A, B = ({k: getattr(layer, part)[name].weight.data for k, layer in layers.items()} for part in ("lora_A", "lora_B"))
    return Adapter(LoRAConfig(4, model.peft_config[name].lora_alpha, target_modules=list(layers)), A, B)


def their_deltas(model, kind, weights, density=DENSITY):
    model.base_model.add_weighted_adapter(
        NAMES, weights, kind, combination_type=kind, svd_rank=RANK, density=density, svd_full_matrices=False
    )
    return {name: layer.get_delta_weight(kind).detach() for name, layer in layers_of(model).items()}


def our_deltas(adapter):
    return {name: adapter.scaling(name) * adapter.B[name] @ A for name, A in adapter.A.items()}


def stacked(weights):
    return torch.tensor(weights, dtype=torch.float64)[:, None, None]


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, delta in ours.items():
        off = ((delta - theirs[name]).norm() / delta.norm()).item()
        assert off < 1e-6, f"{name} is off by {off:.1e} of its size"  # PEFT keeps the weights in float32


SAME = {
    "cat": (UNEQUAL, lambda adapters, weights: concatenate(adapters, weights)),
    "svd": (UNEQUAL, lambda adapters, weights: truncate(adapters, weights, RANK)[0]),
    "ties_svd": (EQUAL, lambda adapters, weights: ties(adapters, weights, DENSITY, RANK)[0]),
    "magnitude_prune_svd": (UNEQUAL, lambda adapters, weights: prune(adapters, weights, DENSITY, RANK)[0]),
    "dare_linear_svd": (UNEQUAL, lambda adapters, weights: dare(adapters, weights, DENSITY, RANK)[0]),
    "dare_ties_svd": (EQUAL, lambda adapters, weights: dare(adapters, weights, DENSITY, RANK, signs=True)[0]),
}


@pytest.mark.parametrize("kind", SAME)
def test_what_works_on_the_updates_is_the_same_in_peft(theirs, monkeypatch, kind):
    weights, combine = SAME[kind]
    same_entries(monkeypatch)
    adapters = [ours_of(theirs, name) for name in NAMES]
    assert_same(our_deltas(combine(adapters, weights)), their_deltas(theirs, kind, weights))


def same_entries(monkeypatch):
    """Makes PEFT drop the entries that `dare` drops, drawn in the same order."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        "peft.utils.merge_utils.random_pruning",
        lambda tensor, density, rescale: drop(tensor[None], density, generator)[0],
    )


def test_under_unequal_weights_peft_elects_signs_before_it_weighs(theirs):
    adapters = [ours_of(theirs, name) for name in NAMES]
    got, ours = their_deltas(theirs, "ties_svd", UNEQUAL), our_deltas(ties(adapters, UNEQUAL, DENSITY, RANK)[0])
    for name in got:
        trimmed = trim(torch.stack([our_deltas(adapter)[name] for adapter in adapters]), DENSITY)
        U, S, Vh = torch.linalg.svd(averaged(trimmed, stacked(UNEQUAL)))
        assert_same({name: U[:, :RANK] * S[:RANK] @ Vh[:RANK]}, {name: got[name]})
        off = ((got[name] - ours[name]).norm() / ours[name].norm()).item()
        assert off > 0.05, f"{name}: both elect alike, {off:.1e}; say so in the docstring"


def averaged(kept, roots):
    """TIES' mean as PEFT takes it: elected without the weights, averaged with them."""
    agree = kept.sign() == kept.sum(0).sign()
    return (roots * kept * agree).sum(0) / agree.sum(0).clamp(min=1)


ON_FACTORS = {
    "linear": lambda parts, roots: (roots * parts).sum(0),
    "ties": lambda parts, roots: averaged(trim(parts, DENSITY), roots),
    "magnitude_prune": lambda parts, roots: (roots * trim(parts, DENSITY)).sum(0),
}


@pytest.mark.parametrize("kind", ON_FACTORS)
def test_what_peft_does_to_factors_is_no_sum_of_updates(theirs, kind):
    adapters = [ours_of(theirs, name) for name in NAMES]
    for name, delta in their_deltas(theirs, kind, EQUAL).items():
        roots = stacked([math.sqrt(w * each.scaling(name)) for w, each in zip(EQUAL, adapters, strict=True)])
        B, A = (ON_FACTORS[kind](torch.stack([getattr(each, part)[name] for each in adapters]), roots) for part in "BA")
        assert_same({name: B @ A}, {name: delta})
        full = sum(w * our_deltas(each)[name] for w, each in zip(EQUAL, adapters, strict=True))
        off = ((delta - full).norm() / full.norm()).item()
        assert off > 0.5, f"{name}: off the sum of the updates by {off:.2f} only"
