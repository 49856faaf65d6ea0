"""Each method changes what it says and nothing else."""

import math

import pytest
import torch

from minilora import GPT, GPTConfig, LoRAConfig, TrainConfig, count_parameters, lora_layers
from minilora.adapters.dora import DoRALinear
from minilora.experiments import methods
from minilora.experiments.methods import (
    EVA_ROWS,
    LORA_CHANGES,
    METHODS,
    BaseFolder,
    Experiment,
    finish,
    prepare,
    training_options,
)
from minilora.linear4bit import quantize_model, quantized_layers
from minilora.quant import Quantization
from minilora.text.batches import Batches
from minilora.text.datasets import Dataset
from minilora.train import evaluate_loss, train

CONFIG = GPTConfig(61, 16, 32, 2, 4, 2, max_position_embeddings=64)
LORA = LoRAConfig(4, 8, target_modules="all-linear")
IDS = torch.randint(61, (12, 16), generator=torch.Generator().manual_seed(1))
DATA = Batches(IDS, IDS.clone())


def plain():
    torch.manual_seed(0)
    return GPT(CONFIG)


def experiment(method, steps=6, rate=1e-2, data=DATA, lora=LORA) -> Experiment:
    base, dataset = BaseFolder(None, None, "cpu"), Dataset("random", data, data, None, None, [])
    training = TrainConfig(steps=steps, batch_size=4, learning_rate=rate)
    return Experiment(base, dataset, method, training, lora, Quantization("int4", 16), 3, 4)


def prepared(method, **options):
    base = plain()
    torch.manual_seed(1)
    return prepare(base, experiment(method, **options))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_the_rest_alone(method):
    model = prepared(method)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    whole = experiment(method, 30, 0.3 if method in ("soft-prompt", "prefix") else 1e-2)
    options = training_options(model, whole)
    before, _ = evaluate_loss(model, DATA, 12), train(model, DATA, whole.training, progress=False, **options)
    after = evaluate_loss(model, DATA, 12)
    assert after < before - 0.02, f"nothing was learned: {before:.4f} before and {after:.4f} after"
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), f"{name} is frozen and changed"
    if method != "full":
        assert frozen, "everything was trained"
    with torch.no_grad():
        assert finish(model, whole)(IDS).isfinite().all(), "the logits hold NaN or infinity"


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "lora+", "lora-fa", "eva", "adalora", "pissa", "olora"])
def test_lora_methods_start_as_the_base(method):
    with torch.no_grad():
        difference = (prepared(method)(IDS) - plain()(IDS)).abs().max().item()
    assert difference < 1e-5, f"the logits differ by {difference:.1e} before training"


def test_what_each_method_is():
    layers = {method: next(lora_layers(prepared(method)))[1] for method in LORA_CHANGES}
    scaling = {method: layer.scaling for method, layer in layers.items()}
    expected = dict.fromkeys(LORA_CHANGES, 2) | {"rslora": pytest.approx(8 / math.sqrt(4))}
    assert scaling == expected, f"alpha / r is 2, for rslora alpha / sqrt(r), for adalora as for lora: {scaling}"
    ranks = {method: layer.r for method, layer in layers.items()}
    assert ranks == dict.fromkeys(LORA_CHANGES, 4) | {"adalora": 6}, f"adalora begins with half as many again: {ranks}"
    odd = next(lora_layers(prepared("adalora", lora=LoRAConfig(3, 6, target_modules="all-linear"))))[1]
    assert (odd.r, odd.scaling) == (5, pytest.approx(2)), f"3 and half of it rounded up, at 2: {odd.r}, {odd.scaling}"
    assert isinstance(layers["dora"], DoRALinear) and not isinstance(layers["lora"], DoRALinear), (
        f"{type(layers['dora'])} and {type(layers['lora'])}"
    )
    assert not layers["lora-fa"].lora_A.requires_grad and layers["lora-fa"].lora_B.requires_grad, (
        "LoRA-FA trains B and not A"
    )
    assert layers["pissa"].lora_B.any() and layers["olora"].lora_B.any() and not layers["eva"].lora_B.any(), (
        "of these only EVA starts with B = 0"
    )
    assert not torch.equal(layers["eva"].lora_A, layers["lora"].lora_A), "EVA's A is the random one"
    for method in LORA_CHANGES:
        found = {layer.quantization for layer in quantized_layers(prepared(method)).values()}
        wanted = {Quantization("int4", 16)} if method in ("qlora", "loftq") else set()
        assert found == wanted, f"{method} should hold its base in {wanted}, not {found}"
        trained = {n.rpartition("lora_")[1] for n, p in prepared(method).named_parameters() if p.requires_grad}
        assert trained == {"lora_"}, f"{method} trains the adapter and nothing else"


def test_loraplus_gives_B_the_faster_rate():
    model = prepared("lora+")
    slow, fast = training_options(model, experiment("lora+"))["parameter_groups"]
    rates = slow["lr"], fast["lr"]
    assert rates == (1e-2, pytest.approx(4e-2)), f"A should learn at 0.01 and B four times as fast, not at {rates}"
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in fast["params"]}
    expected = {name for name in names.values() if "lora_B" in name}
    assert found == expected, f"B of every layer is fast, and nothing else; too many or missing: {found ^ expected}"


def test_adalora_ends_with_the_ranks_of_lora():
    model, whole = prepared("adalora"), experiment("adalora", 40)
    train(model, DATA, whole.training, progress=False, **training_options(model, whole))
    ranks = [layer.r for _, layer in lora_layers(finish(model, whole))]
    assert sum(ranks) == 4 * len(ranks), f"LoRA has {4 * len(ranks)} ranks in all, and here are {sum(ranks)}: {ranks}"
    assert len(set(ranks)) > 1, f"every layer ended with the same rank: {ranks}"


@pytest.mark.parametrize("steps, first, last", [(100, 10, 50), (5, 0, 2), (1, 0, 1)])
def test_adalora_moves_ranks_from_a_tenth_to_half_of_the_run(monkeypatch, steps, first, last):
    asked = []
    monkeypatch.setattr(methods, "RankAllocator", lambda model, *plan: asked.append(plan))
    model = prepared("adalora")
    training_options(model, experiment("adalora", steps))
    expected = (4 * 14, first, last)  # of 7 linears in 2 layers
    assert asked == [expected], f"ranks in all, first and last step of {steps} should be {expected}, not {asked}"


def test_eva_looks_at_the_first_rows_of_the_training_data(monkeypatch):
    ids = torch.randint(61, (EVA_ROWS + 9, 8), generator=torch.Generator().manual_seed(2))
    seen, apply_lora = [], methods.apply_lora
    monkeypatch.setattr(methods, "apply_lora", lambda *words: seen.append(words[2]) or apply_lora(*words))
    prepared("eva", data=Batches(ids, ids.clone()))
    assert torch.equal(seen[0], ids[:64]), f"64 rows of the training data, not {tuple(seen[0].shape)}"


def test_prompts_train_what_their_length_says():
    C, layers, kv = 16, 2, 2 * 2 * 4  # keys and values, 2 heads of 4
    for method, expected in (("soft-prompt", 3 * C), ("prefix", 3 * layers * kv)):
        found = count_parameters(prepared(method))[0]
        assert found == expected, f"{method} of 3 tokens trains {expected} numbers, not {found}"


def test_a_soft_prompt_starts_from_the_first_row():
    start = prepared("soft-prompt")
    (trained,) = [parameter for parameter in start.parameters() if parameter.requires_grad]
    expected = plain().model.embed_tokens.weight[IDS[0, :3]]
    off = (trained.view_as(expected) - expected).abs().max().item()
    assert off == 0, f"it should start as the embeddings of the first tokens, and is off by up to {off:.3g}"


def test_a_base_in_4_bits_is_taken_as_it_is():
    stored = Quantization("fp4", 32, False)
    model = prepare(quantize_model(plain(), stored), experiment("qlora"))
    found = {layer.quantization for layer in quantized_layers(model).values()}
    assert found == {stored}, f"the base came as {stored}, and is {found}"


def test_refusals():
    with pytest.raises(ValueError, match="unknown method 'magic'; known: full, lora"):
        experiment("magic")
    with pytest.raises(ValueError, match="4 bits"):
        prepare(quantize_model(plain()), experiment("full"))
    with pytest.raises(ValueError, match="pissa.*Linear4bit"):
        prepare(quantize_model(plain()), experiment("pissa"))
