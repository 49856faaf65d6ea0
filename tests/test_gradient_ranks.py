"""Ranks from the gradient: the energies are those of ∂L/∂W, the budget is kept and goes where it gains most."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from minilora import GPT, GPTConfig, LoRAConfig, apply_lora, count_parameters, lora_layers
from minilora.adapters import gradient_ranks as module
from minilora.adapters.gradient_ranks import gradient_energies, gradient_ranks, spend, with_ranks
from minilora.adapters.inject import find_targets, linear_layers
from minilora.linear4bit import quantize_model

CONFIG = GPTConfig(50, 16, 24, 2, 2, max_position_embeddings=32)
NAMES = find_targets(list(linear_layers(GPT(CONFIG))), "all-linear")


def plain() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG).double()


def rows(count: int = 6):
    """Token ids and labels, (count, 9): the first row counts few tokens, the last counts all."""
    ids = torch.randint(50, (count, 9), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    for row in range(count):
        labels[row, : 7 - row] = -100
    return ids, labels


def loss_of(model) -> torch.Tensor:
    ids, labels = rows()
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("size", [6, 4, 1])
def test_energies_are_those_of_the_mean_loss_however_it_is_cut(size):
    model = plain()
    loss_of(model).backward()
    layers = linear_layers(model)
    expected = {name: torch.linalg.svdvals(layers[name].weight.grad).square() for name in NAMES}
    found = gradient_energies(plain(), zip(*(part.split(size) for part in rows()), strict=True))
    assert list(found) == NAMES, "every linear layer but the head, in the model's order"
    for name in NAMES:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-9, atol=1e-18, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_of_one_batch_no_two_gradients_are_there_at_once(monkeypatch):
    model, held, keep = plain(), [], module.keep

    def counting(name, energies, weight):
        held.append(sum(parameter.grad is not None for parameter in model.parameters()))
        keep(name, energies, weight)

    monkeypatch.setattr(module, "keep", counting)
    gradient_energies(model, [rows()])
    assert held == [1] * len(NAMES)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = plain().train()
    flags = {name: number % 2 == 0 for number, (name, _) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batches = [rows(), rows()]
    if fails:
        batches[1][0][0, 0] = 999  # no such token
        with pytest.raises(ValueError, match="vocabulary"):
            gradient_energies(model, batches)
    else:
        gradient_energies(model, batches)
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == flags[name] and parameter.grad is None, name
        assert not parameter._post_accumulate_grad_hooks, f"{name} keeps a hook"
        assert torch.equal(parameter, before[name]), name


def test_a_step_along_the_chosen_directions_gains_what_the_energies_say():
    """L(W + ΔW) - L(W) = -ε √(Σ σ_i²) to first order, for a step of size ε."""
    model, epsilon = plain(), 1e-5
    energies = gradient_energies(model, [rows()])
    ranks = spend(energies, dict.fromkeys(NAMES, 1), 20)
    loss_of(model).backward()
    layers = linear_layers(model)
    start, steps = loss_of(model).item(), {}
    for name, r in ranks.items():
        U, S, Vh = torch.linalg.svd(layers[name].weight.grad, full_matrices=False)
        steps[name] = -(U[:, :r] * S[:r]) @ Vh[:r]
    size = math.sqrt(sum(step.square().sum().item() for step in steps.values()))
    with torch.no_grad():
        for name, step in steps.items():
            layers[name].weight += epsilon / size * step
    gain = start - loss_of(model).item()
    best = torch.cat(list(energies.values())).topk(20).values.sum().sqrt().item()
    assert gain == pytest.approx(epsilon * best, rel=1e-3)


def test_the_budget_goes_where_a_number_gains_most():
    energies = {"wide": torch.tensor([7.0, 4.0, 0.1]), "thin": torch.tensor([2.0, 1.5, 0.2]), "flat": torch.zeros(3)}
    costs = {"wide": 4, "thin": 1, "flat": 1}
    assert spend(energies, costs, 1) == {"thin": 1}, "a component of wide gains more, and costs more than there is"
    assert spend(energies, costs, 5) == {"wide": 1, "thin": 1}, "2 for a number, then 7/4, then 1.5"
    assert spend(energies, costs, 4) == {"thin": 3, "flat": 1}, "after the first of thin, wide no longer fits"
    assert spend(energies, costs, 7) == {"wide": 1, "thin": 3}, "what is too dear is passed over"
    assert spend(energies, costs, 1000) == {"wide": 3, "thin": 3, "flat": 3}, "no rank above the full one"
    with pytest.raises(ValueError, match="budget is 0 numbers, and a component of the smallest layer has 1"):
        spend(energies, costs, 0)


def test_at_equal_costs_no_other_ranks_gain_more():
    energies = {name: torch.rand(3, generator=torch.Generator().manual_seed(n)).sort(descending=True).values
                for n, name in enumerate("abc")}  # fmt: skip

    def gain(ranks) -> float:
        return sum(energies[name][:r].sum().item() for name, r in ranks.items())

    others = (dict(zip("abc", each, strict=True)) for each in itertools.product(range(4), repeat=3) if sum(each) == 5)
    assert gain(spend(energies, dict.fromkeys("abc", 7), 5 * 7 + 6)) == pytest.approx(max(map(gain, others)))


@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_has_these_ranks_and_one_scaling(rslora):
    model, config = plain(), LoRAConfig(4, 8, target_modules="all-linear", use_rslora=rslora)
    budget = 4 * sum(sum(linear_layers(model)[name].weight.shape) for name in NAMES)
    ranks = gradient_ranks(model, [rows()], budget)
    assert len(set(ranks.values())) > 1 and set(ranks) <= set(NAMES)
    apply_lora(model, with_ranks(config, ranks))
    assert {name: layer.r for name, layer in lora_layers(model)} == ranks
    scaling = 8 / 4**0.5 if rslora else 8 / 4
    assert [layer.scaling for _, layer in lora_layers(model)] == pytest.approx([scaling] * len(ranks))
    trained = count_parameters(model)[0]
    assert budget - 32 < trained <= budget, "less is left over than the smallest component costs, 16 + 16"


def test_only_the_targets_are_looked_at():
    ranks = gradient_ranks(plain(), [rows()], 200, ["q_proj", "v_proj"])
    assert sum(ranks.values()) == 200 // 32 and all(name.endswith(("q_proj", "v_proj")) for name in ranks)


def test_what_gives_no_ranks_is_refused_in_words():
    ids, labels = rows()
    not_finite = plain()
    with torch.no_grad():
        not_finite.model.norm.weight.fill_(float("nan"))
    cases = {
        "already has LoRA layers": (apply_lora(plain(), LoRAConfig(2)), [(ids, labels)]),
        "is in 4 bits, and codes have no gradient": (quantize_model(GPT(CONFIG)), [(ids, labels)]),
        "no token of the batches counts": (plain(), [(ids, torch.full_like(labels, -100))]),
        "the gradient of .* is not finite": (not_finite, [(ids, labels)]),
    }
    for message, (model, batches) in cases.items():
        with pytest.raises(ValueError, match=message):
            gradient_ranks(model, batches, 1000)
    with pytest.raises(ValueError, match="no token of the batches counts"):
        gradient_ranks(plain(), [], 1000)
    with pytest.raises(ValueError, match="'x_proj' matches no layer"):
        gradient_ranks(plain(), [(ids, labels)], 1000, ["x_proj"])
