"""Each method changes what it says and nothing else; the search for a learning rate finds the valley."""

import math

import pytest
import torch

from minilora import GPT, GPTConfig, LoRAConfig, TrainConfig, count_parameters, lora_layers
from minilora.adapters.dora import DoRALinear
from minilora.experiments import compare
from minilora.experiments.compare import search, table
from minilora.experiments.finetune import tuned_learning_rate
from minilora.experiments.methods import LORA_CHANGES, METHODS, Extras, finish, prepare, training_options
from minilora.quant import quantize_model, quantized_layers
from minilora.text.batches import Batches
from minilora.train import NonFiniteError, evaluate_loss, train

CONFIG = GPTConfig(61, 16, 32, 2, 4, 2, max_position_embeddings=64)
LORA = LoRAConfig(4, 8, target_modules="all-linear")
IDS = torch.randint(61, (12, 16), generator=torch.Generator().manual_seed(1))
EXTRAS = Extras(virtual_tokens=3, loraplus_ratio=4)


def plain():
    torch.manual_seed(0)
    return GPT(CONFIG)


def prepared(method):
    base = plain()
    torch.manual_seed(1)
    return prepare(base, method, LORA, extras=EXTRAS, input_ids=IDS)


def config(steps=6, rate=1e-2):
    return TrainConfig(steps=steps, batch_size=4, learning_rate=rate)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_the_rest_alone(method):
    model = prepared(method)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    settings, data = config(30, 0.3 if method in ("soft-prompt", "prefix") else 1e-2), Batches(IDS, IDS.clone())
    options = training_options(model, method, LORA, settings)
    before, _ = evaluate_loss(model, data, 12), train(model, data, settings, progress=False, **options)
    after = evaluate_loss(model, data, 12)
    assert after < before - 0.02, f"nothing was learned: {before:.4f} before and {after:.4f} after"
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), f"{name} is frozen and changed"
    if method != "full":
        assert frozen, "everything was trained"
    with torch.no_grad():
        assert finish(model, method)(IDS).isfinite().all()


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "lora+", "lora-fa", "eva", "adalora", "pissa", "olora"])
def test_lora_methods_start_as_the_base(method):
    with torch.no_grad():
        difference = (prepared(method)(IDS) - plain()(IDS)).abs().max().item()
    assert difference < 1e-5, f"the logits differ by {difference:.1e} before training"


def test_what_each_method_is():
    layers = {method: next(lora_layers(prepared(method)))[1] for method in LORA_CHANGES}
    assert isinstance(layers["dora"], DoRALinear) and not isinstance(layers["lora"], DoRALinear)
    assert layers["rslora"].scaling == pytest.approx(8 / math.sqrt(4)) and layers["lora"].scaling == 2
    assert not layers["lora-fa"].lora_A.requires_grad and layers["lora-fa"].lora_B.requires_grad
    assert layers["pissa"].lora_B.any() and layers["olora"].lora_B.any() and not layers["eva"].lora_B.any()
    assert not torch.equal(layers["eva"].lora_A, layers["lora"].lora_A)
    assert layers["adalora"].r == 6 and layers["adalora"].scaling == 2
    for method in LORA_CHANGES:
        assert bool(quantized_layers(prepared(method))) == (method in ("qlora", "loftq")), method


def test_loraplus_gives_B_the_faster_rate():
    model = prepared("lora+")
    slow, fast = training_options(model, "lora+", LORA, config(), EXTRAS)["parameter_groups"]
    assert (slow["lr"], fast["lr"]) == (1e-2, pytest.approx(4e-2))
    assert {id(p) for p in fast["params"]} == {id(layer.lora_B) for _, layer in lora_layers(model)}


def test_adalora_ends_with_the_ranks_of_lora():
    model, settings = prepared("adalora"), config(40)
    options = training_options(model, "adalora", LORA, settings)
    train(model, Batches(IDS, IDS.clone()), settings, progress=False, **options)
    ranks = [layer.r for _, layer in lora_layers(finish(model, "adalora"))]
    assert sum(ranks) == 4 * len(ranks) and len(set(ranks)) > 1, ranks


def test_prompts_train_what_their_length_says():
    C, layers, kv = 16, 2, 2 * 2 * 4  # keys and values, 2 heads of 4
    assert count_parameters(prepared("soft-prompt"))[0] == 3 * C
    assert count_parameters(prepared("prefix"))[0] == 3 * layers * kv


def test_refusals():
    with pytest.raises(ValueError, match="unknown method 'magic'; known: full, lora"):
        prepare(plain(), "magic", LORA)
    with pytest.raises(ValueError, match="4 bits"):
        prepare(quantize_model(plain()), "full", LORA)
    with pytest.raises(ValueError, match="eva.*training data"):
        prepare(plain(), "eva", LORA)
    with pytest.raises(ValueError, match="pissa.*Linear4bit"):
        prepare(quantize_model(plain()), "pissa", LORA)


def test_every_method_has_a_tuned_rate():
    for method in METHODS:
        for data in ("json", "dialect"):
            assert 0 < tuned_learning_rate(data, method) < 10
    with pytest.raises(ValueError, match="'magic'.*--learning-rate"):
        tuned_learning_rate("json", "magic")


@pytest.mark.parametrize("valley", [1e-4, 1e-2, 1.0])
def test_the_search_goes_on_until_both_neighbours_are_worse(valley):
    losses = search(lambda rate: abs(math.log(rate / valley)), [3e-3, 1e-2, 3e-2])
    best = min(losses, key=losses.get)
    assert best == pytest.approx(valley, rel=0.3) and min(losses) < best < max(losses), losses


def test_a_diverged_neighbour_ends_the_search():
    losses = search(lambda rate: None if rate > 0.02 else -rate, [3e-3, 1e-2, 3e-2])
    assert losses == {3e-3: -3e-3, 1e-2: -1e-2, 3e-2: None}


def test_a_grid_that_diverges_throughout_is_named(monkeypatch, tmp_path):
    def diverge(*_, **__):
        raise NonFiniteError("diverged")

    monkeypatch.setattr(compare, "run", diverge)
    monkeypatch.setattr(compare, "LEARNING_RATES", tmp_path / "rates.json")
    with pytest.raises(ValueError, match="dora diverged at every rate.*0.003"):
        compare.tune(None, None, ["dora"], LORA, 4, 2)
    assert not (tmp_path / "rates.json").exists()


def test_a_table_of_many_methods_comes_in_blocks():
    row = {"seed": 0, "trainable_parameters": 1, "total_parameters": 2, "bits_per_weight": 32.0, "learning_rate": 0.1}
    row |= {"seconds_per_step": 1.0, "best_validation_loss": 0.5, "score": 1.0, "artifact_bytes": 3, "step_ratio": 1.0}
    row |= {"bytes": dict.fromkeys(("weights", "gradients", "optimizer", "activations", "peak"), 1)}
    results = {"task": "t", "base": "b", "seeds": [0], "environment": {"device": "cpu", "torch": "2"}}
    results |= {"loss_floor": None, "score_before": None, "runs": [row | {"method": method} for method in METHODS]}
    text = table(results)
    assert all(text.count(f" {method}\n") + text.count(f" {method} ") == 1 for method in METHODS), text
    assert text.count("over full's") == 3 and max(map(len, text.splitlines())) <= 124
