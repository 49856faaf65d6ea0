"""Rank allocation: the budget is kept, what matters stays, and what is left computes the same function."""

import re

import pytest
import torch
from torch import nn

from minilora import GPT, GPTConfig, LoRAConfig, TrainConfig, apply_lora, load_adapter, lora_layers, save_adapter
from minilora.adapters.allocate import RankAllocator, component_importance, most_important, shrink
from minilora.lora import LoRALinear
from minilora.text.batches import Batches
from minilora.train import make_optimizer, train

CONFIG = GPTConfig(50, 16, 24, 2, 2, max_position_embeddings=32)


def adapted(r=4, **more):
    torch.manual_seed(0)
    return apply_lora(GPT(CONFIG), LoRAConfig(r, 8, target_modules="all-linear", **more))


def fill(model, std=0.1):
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_A, std=std)
        nn.init.normal_(layer.lora_B, std=std)
    return model


def data(rows=16):
    ids = torch.randint(50, (rows, 12), generator=torch.Generator().manual_seed(3))
    return Batches(ids, ids.clone())


def logits(model):
    with torch.no_grad():
        return model.double()(data().input_ids)


def ranks(model):
    return {name: int((layer.lora_B != 0).any(0).sum()) for name, layer in lora_layers(model)}


def trained(budget=20, steps=20, start=2, end=10, **more):
    model = adapted()
    allocator = RankAllocator(model, budget, start, end, every=2)
    config = TrainConfig(steps=steps, batch_size=4, learning_rate=1e-2)
    train(model, data(), config, progress=False, after_step=allocator, **more)
    return model


def test_importance_is_weight_times_root_mean_square_gradient():
    layer = LoRALinear(nn.Linear(5, 6), 3, 3).double()
    nn.init.normal_(layer.lora_B)
    layer.base_layer.requires_grad_(False)
    optimizer = make_optimizer(layer, TrainConfig(steps=1, batch_size=1, learning_rate=1e-3))
    for weight in (layer.lora_A, layer.lora_B):
        weight.grad = torch.randn_like(weight)
    gradients = [weight.grad.clone() for weight in (layer.lora_A, layer.lora_B)]
    optimizer.step()
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    scale = (1 - 0.95) ** 0.5  # Adam's v after one step is (1 - beta2) g²
    for i in range(3):
        expected = scale * ((A[i] * gradients[0][i]).abs().mean() + (B[:, i] * gradients[1][:, i]).abs().mean())
        assert torch.isclose(component_importance(layer, optimizer)[i], expected), f"component {i}"


def test_the_best_of_each_layer_stays_and_the_rest_goes_by_importance():
    importance = {"a": torch.tensor([0.1, 0.3, 0.2]), "b": torch.tensor([9.0, 8.0, 7.0]), "c": torch.tensor([0.0, 0.0])}
    kept = most_important(importance, 5)
    assert kept["a"].tolist() == [False, True, False]
    assert kept["b"].tolist() == [True, True, True]
    assert sorted(kept["c"].tolist()) == [False, True]


def test_budget_falls_from_all_to_the_budget():
    allocator = RankAllocator(adapted(), 20, start=10, end=50)
    budgets = [allocator.budget_at(step) for step in range(0, 80)]
    assert budgets[:11] == [56] * 11 and budgets[50:] == [20] * 30
    assert all(a >= b for a, b in zip(budgets, budgets[1:], strict=False)), budgets
    assert budgets[20] < 56 - (56 - 20) / 2, "the cubic schedule gives most of it up early"


def test_training_keeps_the_budget_and_moves_ranks():
    found = ranks(trained())
    assert sum(found.values()) == 20, found
    assert min(found.values()) >= 1 and len(set(found.values())) > 1, f"every layer got the same rank: {found}"


def test_pruned_components_stay_dead_after_the_end():
    for _, layer in lora_layers(trained(steps=30)):
        dead = ~(layer.lora_B != 0).any(0)
        assert (layer.lora_A[dead] == 0).all(), "a pruned component moved after the end of the allocation"


def test_a_component_can_come_back_before_the_end():
    model = adapted()
    allocator = RankAllocator(model, 14, start=0, end=100, every=5)
    counts = []

    def watch(step, optimizer):
        allocator(step, optimizer)
        counts.append(sum(ranks(model).values()))

    train(model, data(), TrainConfig(steps=7, batch_size=4, learning_rate=1e-2), progress=False, after_step=watch)
    assert counts[4] == allocator.budget_at(5) < 56, counts
    assert counts[5] == 56, "after the next step every pruned column has moved again"


def test_shrink_computes_the_same_and_round_trips(tmp_path):
    model = trained()
    before, found = logits(model).clone(), ranks(model)
    shrink(model)
    assert {name: layer.r for name, layer in lora_layers(model)} == found
    assert (logits(model) - before).abs().max() < 1e-12
    assert model.lora_config.rank_pattern == {f"^{re.escape(name)}": r for name, r in found.items()}
    model.float()
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    again = load_adapter(GPT(CONFIG), tmp_path)
    for (name, ours), (_, theirs) in zip(lora_layers(model), lora_layers(again), strict=True):
        assert torch.equal(ours.lora_A, theirs.lora_A) and ours.scaling == theirs.scaling, name


@pytest.mark.parametrize("rslora", [False, True])
def test_shrink_keeps_the_scaling_of_layers_with_patterns(rslora):
    model = fill(adapted(use_rslora=rslora, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3.0}))
    for number, (_, layer) in enumerate(lora_layers(model)):
        layer.lora_B.data[:, : number % layer.r] = 0
    before, scalings = logits(model).clone(), {name: layer.scaling for name, layer in lora_layers(model)}
    shrink(model)
    for name, layer in lora_layers(model):
        assert layer.scaling == pytest.approx(scalings[name], rel=1e-12), name
    assert (logits(model) - before).abs().max() < 1e-12


def test_shrink_tells_a_layer_from_one_whose_name_ends_like_it():
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "side": nn.ModuleDict({"proj": nn.Linear(4, 4)})})
    model = fill(apply_lora(model, LoRAConfig(2, 2, target_modules=["proj"])))
    model["proj"].lora_B.data[:, 1] = 0
    assert {name: layer.r for name, layer in lora_layers(shrink(model))} == {"proj": 1, "side.proj": 2}


def test_a_layer_of_zeros_keeps_one_component():
    model = fill(adapted())
    next(lora_layers(model))[1].lora_B.data.zero_()
    assert next(lora_layers(shrink(model)))[1].r == 1


def test_a_resumed_run_is_the_same_run(tmp_path):
    whole, state = trained(), tmp_path / "state.safetensors"

    def half(resume, stop=None):
        model = adapted()
        allocator = RankAllocator(model, 20, 2, 10, every=2)

        def look(step, optimizer):
            allocator(step, optimizer)
            if step == stop:
                raise KeyboardInterrupt

        config = TrainConfig(steps=20, batch_size=4, learning_rate=1e-2, save_every=3)
        try:
            train(model, data(), config, progress=False, after_step=look, state_path=state, resume=resume)
        except KeyboardInterrupt:
            pass
        return model

    half(False, stop=8)
    resumed = half(True)
    for (name, ours), (_, theirs) in zip(lora_layers(resumed), lora_layers(whole), strict=True):
        assert torch.equal(ours.lora_A, theirs.lora_A) and torch.equal(ours.lora_B, theirs.lora_B), name


@pytest.mark.parametrize("budget", [13, 57])
def test_budgets_that_cannot_be(budget):
    with pytest.raises(ValueError, match=f"rank budget is {budget}.*at least 14.*at most 56"):
        RankAllocator(adapted(), budget, 0, 10)


@pytest.mark.parametrize("steps", [(5, 5, 1), (-1, 5, 1), (0, 5, 0)])
def test_steps_that_cannot_be(steps):
    with pytest.raises(ValueError, match="are needed"):
        RankAllocator(adapted(), 20, *steps)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_model_that_started_from_w_is_refused(start):
    with pytest.raises(ValueError, match="ranks cannot move after a start from W"):
        RankAllocator(adapted(init_lora_weights=start), budget=20, start=2, end=10)
