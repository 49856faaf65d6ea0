"""Other starts for A and B: what each promises, in float64, with A and B random where training would move them."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from minilora import (
    GPT,
    GPTConfig,
    LoRAConfig,
    TrainConfig,
    apply_lora,
    disable_lora,
    load_adapter,
    load_model,
    merge_lora,
    save_adapter,
    save_model,
    unmerge_lora,
)
from minilora.adapters.adapter import Adapter, apply_adapter, extract_adapter, plain_config
from minilora.adapters.combine import concatenate
from minilora.adapters.inject import (
    adapter_parameters,
    apply_loftq,
    layer_rank,
    lora_layers,
    pattern_value,
    remove_lora,
)
from minilora.adapters.starts import energy_rank, eva_directions, loftq, olora, pissa, start_layer
from minilora.adapters.swap import AdapterShelf
from minilora.adapters.variants import freeze_A, loraplus_groups
from minilora.config import STARTS, lora_scaling
from minilora.fast import FastLoRALinear
from minilora.inference.bank import AdapterBank
from minilora.linear4bit import Linear4bit, dequantize_model, quantize_model
from minilora.lora import LoRALinear
from minilora.quant import Quantization, dequantize
from minilora.storage.fingerprint import fingerprint
from minilora.train import make_optimizer, train

FEW, MANY = torch.arange(8).view(1, 8), torch.arange(64).view(4, 16)  # below and above a layer's width in tokens
FROM_WEIGHT = ["pissa", "olora"]  # starts in which B is not zero
OPTIONS = {
    "plain": {},
    "rsLoRA": dict(use_rslora=True),
    "DoRA": dict(use_dora=True),
    "patterns": dict(rank_pattern={"q_proj": 5}, alpha_pattern={r"layers\.1\.mlp\..*": 3}),
    "patterns under rsLoRA": dict(use_rslora=True, rank_pattern={"q_proj": 5}, alpha_pattern={"up_proj": 3}),
}


def make_base(dtype=torch.float64, tied=False, seed=0):
    """A small GPT with random weights and biases, of float32's values: no file loses anything."""
    torch.manual_seed(seed)
    shape = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, attention_bias=True)
    model = GPT(GPTConfig(64, 32, 48, 2, tie_word_embeddings=tied, **shape))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def started(start, dtype=torch.float64, **options):
    config = dict(r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights=start)
    batches = MANY if start == "eva" else None
    return apply_lora(make_base(dtype), LoRAConfig(**{**config, **options}), batches)


def trained(start, dtype=torch.float64, **options):
    """As if trained: A, B and magnitudes have moved, by float32's values."""
    model = started(start, dtype, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(dtype)
    for _, layer in lora_layers(model):
        for tensor in (*layer.parameters(recurse=False), layer.start_A, layer.start_B):
            if tensor is not None:
                tensor.data.copy_(tensor.data.float())
    return model


def logits(model, ids=MANY):
    with torch.no_grad():
        return model(ids)


def assert_close(got, expected, what, tolerance=1e-10):
    difference = (got - expected).abs().max().item()
    assert difference <= tolerance, f"{what}: off by {difference:.2e}"


def assert_far(got, expected, what):
    difference = (got - expected).abs().max().item()
    assert difference > 0.01, f"{what}: off by {difference:.2e} only, so the test says nothing"


# From a weight to A and B


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_pissa_is_the_best_of_its_rank_and_shares_it_evenly(shape):
    W = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A, B = pissa(W, 4, 2.5)
    S = torch.linalg.svdvals(W)
    assert A.shape == (4, shape[1]) and B.shape == (shape[0], 4)
    assert_close(torch.linalg.svdvals(2.5 * B @ A)[:4], S[:4], "the largest singular values")
    assert_close((W - 2.5 * B @ A).norm(), S[4:].norm(), "what is left")  # Eckart and Young
    assert_close(A @ A.T, torch.diag(S[:4] / 2.5), "A Aᵀ")
    assert_close(B.T @ B, torch.diag(S[:4] / 2.5), "Bᵀ B")


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_olora_is_the_front_of_a_qr_decomposition(shape):
    W = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A, B = olora(W, 4, 2.5)
    assert_close(B.T @ B, torch.eye(4, dtype=torch.float64), "Bᵀ B")
    assert_close((B @ A)[:, :4], W[:, :4], "the first r columns of W")
    assert_close(A[:, :4].tril(-1), torch.zeros(4, 4, dtype=torch.float64), "below A's diagonal")


def test_gaussian_is_normal_with_deviation_one_over_r():
    torch.manual_seed(0)
    layers = [layer for _, layer in lora_layers(started("gaussian", r=16))]
    values = torch.cat([layer.lora_A.detach().flatten() for layer in layers])
    assert abs(values.std() * 16 - 1) < 0.03 and values.abs().max() * 16 > 3, "uniform values end at √3 deviations"
    assert not any(layer.lora_B.any() for layer in layers)


@pytest.mark.parametrize("start", ["PiSSA", "pissa_niter_4", "loftq", False, None, 2])
def test_an_unknown_start_is_refused_beside_the_known(start):
    with pytest.raises(ValueError, match=f"init_lora_weights is {start!r}; known are .*'pissa', 'olora'.*apply_loftq"):
        LoRAConfig(init_lora_weights=start)


# W is never touched


def weights_of(model):
    """By plain name, a copy of every parameter and buffer of the base."""
    names = {f"{name}.{part}" for name, layer in lora_layers(model) for part in own_tensors(layer)}
    return {
        name.replace(".base_layer.", "."): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if name not in names and isinstance(tensor, torch.Tensor)
    }


def own_tensors(layer):
    return {"lora_A", "lora_B", "lora_magnitude_vector", "start_A", "start_B"} & set(layer.state_dict())


def assert_untouched(model, base, when):
    """Every weight of the base is bit for bit what it was."""
    found = weights_of(model)
    assert found.keys() == base.keys(), f"{when}: {sorted(found.keys() ^ base.keys())} came or went"
    for name, weight in base.items():
        off = (found[name].double() - weight.double()).abs()
        assert torch.equal(found[name], weight), (
            f"{when}: {int((off > 0).sum())} numbers of {name} differ from the base's, by {off.max():.1e} at most"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("start", STARTS)
def test_no_start_touches_w_whatever_is_done_after(start, use_dora, dtype):
    """Bit for bit, and so the base's own logits where the adapter is off or out."""
    base = make_base(dtype)
    weights, said = weights_of(base), {ids: logits(base, ids) for ids in (FEW, MANY)}
    model = started(start, dtype, use_dora=use_dora)
    assert_untouched(model, weights, "at the start")
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        model(MANY).float().square().mean().backward()
        optimizer.step()
    assert_untouched(model, weights, "after training")
    merge_lora(model)
    for when in ("merged", "unmerged"):
        with disable_lora(model):
            for ids, expected in said.items():
                off = (logits(model, ids) - expected).abs().max().item()
                assert off == 0, f"disabled and {when}: logits off by {off:.1e}; the base's are wanted, bit for bit"
        unmerge_lora(model)
        assert_untouched(model, weights, "unmerged")
    moved = (logits(model) - said[MANY]).abs().max().item()
    assert moved > 1e-3, f"training moved the logits by {moved:.1e} only, so the test says nothing"
    remove_lora(model)
    assert not any(lora_layers(model)) and not hasattr(model, "lora_config")
    assert_untouched(model, weights, "removed")
    for ids, expected in said.items():
        assert torch.equal(logits(model, ids), expected), "logits of the model whose adapter was taken out"


# PiSSA and OLoRA: B does not start at zero, and the start is taken off


@pytest.mark.parametrize("ids", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_the_model_starts_as_the_base_though_b_is_not_zero(start, options, ids):
    base, model = make_base(), started(start, **OPTIONS[options])
    assert_close(logits(model, ids), logits(base, ids), "logits at the start")
    for name, layer in lora_layers(model):
        assert_far(layer.lora_B @ layer.lora_A, torch.zeros(()), f"{name}: BA at the start")
        assert_close(layer.delta_weight(), torch.zeros(()), f"{name}: ΔW before any training")


@pytest.mark.parametrize("ids", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_dropout_at_the_start_drops_nothing_visible(start, use_dora, ids):
    """BA and B0A0 see the same dropped input, and cancel. In the papers' form the base would see the whole one."""
    base, model = make_base(), started(start, lora_dropout=0.5, use_dora=use_dora).train()
    assert all(layer.training for _, layer in lora_layers(model))
    assert_close(logits(model, ids), logits(base, ids), "logits at the start, while training")
    for layer in adapter_parameters(model):
        layer.data += 0.1
    said = logits(model, ids)
    assert_far(logits(model, ids), said, "after training dropout does show: two passes with two masks")


@pytest.mark.parametrize("options", OPTIONS)
def test_pissa_starts_from_the_largest_singular_values_of_w(options):
    base, model = make_base(), started("pissa", **OPTIONS[options])
    for name, layer in lora_layers(model):
        W = base.get_submodule(name).weight
        S, product = torch.linalg.svdvals(W), layer.scaling * layer.lora_B @ layer.lora_A
        assert_close(torch.linalg.svdvals(product)[: layer.r], S[: layer.r], f"{name}: in the adapter")
        assert_close(torch.linalg.svdvals(W - product)[0], S[layer.r], f"{name}: the largest that is left of W")


@pytest.mark.parametrize("options", OPTIONS)
def test_olora_starts_from_the_front_of_qr(options):
    base, model = make_base(), started("olora", **OPTIONS[options])
    for name, layer in lora_layers(model):
        W, B, r = base.get_submodule(name).weight, layer.lora_B, layer.r
        assert_close(B.T @ B, torch.eye(r, dtype=torch.float64), f"{name}: BᵀB")
        assert_close((B @ layer.lora_A)[:, :r], W[:, :r], f"{name}: the first r columns of W")


@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_the_start_is_a_copy_of_a_and_b_and_stays_when_they_move(start):
    model = started(start)
    for name, layer in lora_layers(model):
        for part, first in ((layer.lora_A, layer.start_A), (layer.lora_B, layer.start_B)):
            assert torch.equal(part, first) and part.data_ptr() != first.data_ptr(), f"{name}: the start is no copy"
            assert not first.requires_grad
    before = {name: (layer.start_A.clone(), layer.start_B.clone()) for name, layer in lora_layers(model)}
    for parameter in adapter_parameters(model):
        parameter.data += 1
    for name, layer in lora_layers(model):
        assert torch.equal(layer.start_A, before[name][0]) and torch.equal(layer.start_B, before[name][1]), name


@pytest.mark.parametrize("start", [True, "gaussian", "eva"])
def test_where_b_starts_at_zero_nothing_is_remembered(start):
    for name, layer in lora_layers(started(start)):
        assert layer.start_A is None and layer.start_B is None and not layer.lora_B.any(), name


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_disabled_is_the_original_model_merged_or_not(start, options, merged):
    base, model = make_base(), trained(start, **OPTIONS[options])
    said = logits(model)
    assert_far(said, logits(base), "trained")
    if merged:
        merge_lora(model)
    with disable_lora(model):
        for ids in (FEW, MANY):
            assert_close(logits(model, ids), logits(base, ids), "disabled", 0)
    assert_close(logits(model), said, "enabled again")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_merge_adds_what_training_changed_and_unmerge_restores_the_bits(start, options):
    base, model = make_base(), trained(start, **OPTIONS[options])
    said, delta = logits(model), {name: layer.delta_weight().detach() for name, layer in lora_layers(model)}
    merge_lora(model)
    assert_close(logits(model), said, "merged")
    for name, layer in lora_layers(model):
        assert_close(layer.base_layer.weight - base.get_submodule(name).weight, delta[name], f"{name}: ΔW")
        assert_close(layer.delta_weight(), delta[name], f"{name}: ΔW while merged")
    with pytest.raises(ValueError, match="are merged"):
        remove_lora(model)
    unmerge_lora(model)
    assert_untouched(model, weights_of(base), "unmerged")
    assert_close(logits(model), said, "unmerged", 0)


def test_delta_weight_is_the_difference_of_the_two_products():
    for name, layer in lora_layers(trained("pissa")):
        s, A, B, A0, B0 = layer.scaling, layer.lora_A, layer.lora_B, layer.start_A, layer.start_B
        assert_close(layer.delta_weight(), s * (B @ A - B0 @ A0), f"{name}: ΔW")


def test_dora_after_pissa_is_dora_of_the_difference():
    """g ⊙ (W + s(BA - B0A0)), its norm and all."""
    base, model = make_base(), trained("pissa", use_dora=True)
    for name, layer in lora_layers(model):
        W = base.get_submodule(name).weight
        V = W + layer.scaling * (layer.lora_B @ layer.lora_A - layer.start_B @ layer.start_A)
        assert_close(layer.norms(), V.norm(dim=1), f"{name}: row norms")
        expected = (layer.lora_magnitude_vector / V.norm(dim=1))[:, None] * V - W
        assert_close(layer.delta_weight(), expected, f"{name}: ΔW")


@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_the_gradients_are_those_of_the_formula(start):
    for options in ({}, dict(use_dora=True)):
        layer = dict(lora_layers(trained(start, **options)))["model.layers.0.mlp.up_proj"]
        A, B, A0, B0, W = layer.lora_A, layer.lora_B, layer.start_A, layer.start_B, layer.base_layer.weight
        V = W + layer.scaling * (B @ A - B0 @ A0)
        if options:
            V = (layer.lora_magnitude_vector / V.detach().norm(dim=1))[:, None] * V
        for rows in (4, 100):
            x = torch.randn(rows, layer.in_features, dtype=torch.float64, requires_grad=True)
            inputs = (x, *layer.parameters(recurse=False))
            expected = torch.autograd.grad(
                nn.functional.linear(x, V, layer.base_layer.bias).sin().sum(), inputs, retain_graph=True
            )
            for number, (a, b) in enumerate(
                zip(torch.autograd.grad(layer(x).sin().sum(), inputs), expected, strict=True)
            ):
                assert_close(a, b, f"{rows} tokens, {options}: gradient {number} of x and {list(layer._parameters)}")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_it_is_saved_as_plain_lora_of_twice_the_rank_on_the_plain_base(tmp_path, start, options):
    base, model = make_base(), trained(start, **OPTIONS[options])
    marks = {"the base": fingerprint(base), "the model that started from it": fingerprint(model)}
    assert len(set(marks.values())) == 1, f"one base, and so one fingerprint, was expected: {marks}"
    save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["r"] == 6 and settings["init_lora_weights"] is True
    loaded = load_adapter(make_base(), tmp_path)  # refused if it named another base
    for ids in (FEW, MANY):
        assert_close(logits(loaded, ids), logits(model, ids), "loaded on the plain base")
    for (name, layer), (_, started_layer) in zip(lora_layers(loaded), lora_layers(model), strict=True):
        assert layer.start_A is None and layer.lora_A.shape[0] == 2 * started_layer.r, name
        assert layer.r == 2 * started_layer.r and math.isclose(layer.scaling, started_layer.scaling), name
    merge_lora(model)
    mark = fingerprint(model)
    assert mark == marks["the base"], f"merged, the fingerprint is {mark}, and the base's is {marks['the base']}"
    save_adapter(model, tmp_path / "merged")
    merged = load_adapter(make_base(), tmp_path / "merged")
    assert torch.equal(logits(merged), logits(loaded)), "merged or not, the adapter is the same"


@pytest.mark.parametrize("options", OPTIONS)
def test_the_plain_config_doubles_ranks_at_the_same_scaling_and_copies(options):
    for start in STARTS:
        config = LoRAConfig(r=3, lora_alpha=7, init_lora_weights=start, **OPTIONS[options])
        before, plain = copy.deepcopy(config), plain_config(config)
        times = 2 if start in FROM_WEIGHT else 1
        assert plain.r == 3 * times and plain.init_lora_weights is True, f"{start}: {plain}"
        assert plain.rank_pattern == {key: r * times for key, r in config.rank_pattern.items()}
        assert {key: type(r) for key, r in plain.rank_pattern.items()} == dict.fromkeys(config.rank_pattern, int)
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"):
            scalings = []
            for one in (config, plain):
                r, alpha = layer_rank(one, name), pattern_value(one.alpha_pattern, name, one.lora_alpha)
                scalings.append(lora_scaling(r, alpha, one.use_rslora))
            assert math.isclose(*scalings), f"{start}: {name} was scaled by {scalings[0]}, and now by {scalings[1]}"
        plain.rank_pattern["x"] = plain.alpha_pattern["x"] = 1
        plain.target_modules.append("x")
        assert config == before, f"{start}: the config was changed, or shares a part with its plain copy"


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("start", STARTS)
def test_an_adapter_is_a_copy_of_the_model_s(start, use_dora):
    model = trained(start, use_dora=use_dora)
    said, adapter = logits(model), extract_adapter(model)
    for part in (adapter.A, adapter.B, adapter.magnitude):
        for tensor in part.values():
            assert not tensor.requires_grad
            tensor.zero_()
    adapter.config.target_modules = []
    assert_close(logits(model), said, "the model, after its adapter was set to zero", 0)
    assert model.lora_config.target_modules == "all-linear"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("start", STARTS)
def test_an_adapter_knows_the_scaling_of_every_layer_it_was_taken_from(start, options):
    model = started(start, **OPTIONS[options])
    adapter = extract_adapter(model)
    for name, layer in lora_layers(model):
        found = adapter.scaling(name)
        assert math.isclose(found, layer.scaling), f"{name}: the adapter says s = {found}, the layer {layer.scaling}"


@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_everything_that_takes_adapters_takes_it(start):
    model = trained(start)
    adapter, said = extract_adapter(model), logits(model)
    assert_close(logits(apply_adapter(make_base(), adapter)), said, "applied")
    shelf = AdapterShelf(make_base())
    shelf.add("a", adapter)
    shelf.switch("a")
    assert_close(logits(shelf.model), said, "from the shelf")
    assert_close(AdapterBank(make_base(), {"a": adapter}).forward(MANY, ["a"] * 4), said, "from the bank")
    assert_close(logits(apply_adapter(make_base(), concatenate([adapter], [1.0]))), said, "combined")
    with torch.no_grad():
        adapter.A["model.layers.0.mlp.up_proj"].zero_()
        adapter.B["model.layers.0.mlp.up_proj"].zero_()
    assert_close(logits(model), said, "the adapter is a copy")


@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_an_adapter_whose_config_names_the_start_is_plain_lora_all_the_same(start):
    """Its numbers are A and B as they act. A start of its own would be wrong, and so would a rank that doubles."""
    plain = extract_adapter(trained(True))
    adapter = Adapter(replace(plain.config, init_lora_weights=start), plain.A, plain.B)
    said, shelf = logits(trained(True)), AdapterShelf(make_base())
    shelf.add("a", adapter)
    shelf.switch("a")
    for where, model in (("applied", apply_adapter(make_base(), adapter)), ("shelf", shelf.model)):
        assert torch.equal(logits(model), said), f"{where}: off by {(logits(model) - said).abs().max():.1e}"
        assert extract_adapter(model).config == plain.config, where


@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_a_tied_weight_may_start_from_it_and_stays_the_embedding_s(start, tmp_path):
    base, config = make_base(tied=True), dict(target_modules=["q_proj", "lm_head"])
    weights, model = weights_of(base), make_base(tied=True)
    apply_lora(model, LoRAConfig(r=3, lora_alpha=7, init_lora_weights=start, **config))
    assert_close(logits(model), logits(base), "logits at the start")
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight
    for parameter in adapter_parameters(model):
        parameter.data += 0.125
    said = logits(model)
    assert_far(said, logits(base), "trained")
    assert_untouched(model, weights, "trained")
    with pytest.raises(ValueError, match="cannot merge lm_head"):
        merge_lora(model)
    save_adapter(model, tmp_path)
    assert_close(logits(load_adapter(make_base(tied=True), tmp_path)), said, "loaded on the plain base", 1e-5)
    remove_lora(model)
    assert_close(logits(model), logits(base), "taken out", 0)


@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_on_a_bfloat16_base_the_start_is_exact_in_float32(start):
    base, model = make_base(torch.bfloat16), started(start, torch.bfloat16)
    for name, layer in lora_layers(model):
        dtypes = {tensor.dtype for tensor in (layer.lora_A, layer.lora_B, layer.start_A, layer.start_B)}
        assert dtypes == {torch.float32} and layer.base_layer.weight.dtype == torch.bfloat16, f"{name}: {dtypes}"
        W = base.get_submodule(name).weight.double()
        A, B = {"pissa": pissa, "olora": olora}[start](W, layer.r, layer.scaling)
        error = (layer.lora_B.double() @ layer.lora_A.double() - B @ A).abs().max().item()
        assert error < 1e-5, f"{name}: BA is off by {error:.1e} from that of W in float64"


@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_what_it_remembers_is_as_small_as_the_adapter(start):
    def numbers(model):
        return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))

    model, saved = started(start), []
    expected = sum(3 * (layer.in_features + layer.out_features) for _, layer in lora_layers(model))
    found = numbers(model) - numbers(started(True))
    assert found == expected, f"{found} numbers more than the plain start has, {expected} expected"
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model(MANY)
    weights = {layer.base_layer.weight.data_ptr() for _, layer in lora_layers(model)}
    for name, layer in lora_layers(model):
        shape = layer.base_layer.weight.shape
        extra = {t.data_ptr() for t in saved if t.shape == shape} - weights
        assert not extra, f"{name}: {len(extra)} more tensors of W's shape {tuple(shape)} are kept for backward than W"


@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_training_moves_a_and_b_and_nothing_else(start):
    model = started(start)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(MANY).square().mean().backward()
    torch.optim.SGD(adapter_parameters(model), lr=0.1).step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.endswith(("lora_A", "lora_B"))), name


def test_its_state_dict_holds_the_start():
    model, other = trained("pissa"), started("pissa")
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(RuntimeError, match="start_A"):
        started(True).load_state_dict(model.state_dict())
    moved = copy.deepcopy(model).float()
    assert dict(lora_layers(moved))["model.layers.0.mlp.up_proj"].start_A.dtype == torch.float32
    with disable_lora(moved):
        assert_close(logits(moved).double(), logits(make_base()), "disabled, in float32", 1e-4)


@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_a_run_that_was_killed_goes_on_from_the_same_start(tmp_path, start):
    ids = torch.randint(64, (12, 16), generator=torch.Generator().manual_seed(3))
    data = SimpleNamespace(input_ids=ids, labels=ids.clone())
    config = TrainConfig(steps=4, batch_size=3, learning_rate=1e-2, save_every=1)
    whole, killed, state = started(start, torch.float32), started(start, torch.float32), tmp_path / "state.safetensors"
    train(whole, data, config, state_path=tmp_path / "whole.safetensors", progress=False)
    killed.register_forward_pre_hook(lambda *_: seen.append(1) if len(seen) < 2 else 1 / 0)
    seen = []
    with pytest.raises(ZeroDivisionError):
        train(killed, data, config, state_path=state, progress=False)
    resumed = started(start, torch.float32)
    train(resumed, data, config, state_path=state, resume=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    for other in ("gaussian", *(name for name in FROM_WEIGHT if name != start)):
        with pytest.raises(ValueError, match="frozen_digest"):
            train(started(other, torch.float32), data, config, state_path=state, resume=True, progress=False)


# Other weights under the same A and B


@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_put_into_4_bits_after_the_start_the_adapter_is_plain_lora_on_that_base(tmp_path, start):
    floats = trained(start, torch.float32)
    delta = {name: layer.delta_weight() for name, layer in lora_layers(floats)}
    rounded, model = quantize_model(make_base(torch.float32)), quantize_model(floats)
    assert model is floats
    said = logits(model)
    for name, layer in lora_layers(model):
        if name != "lm_head":
            assert isinstance(layer.base_layer, Linear4bit), name
        assert_close(layer.delta_weight(), delta[name], f"{name}: ΔW", 0)
    with disable_lora(model):
        assert_close(logits(model), logits(rounded), "disabled", 0)
    marks = {"the 4-bit base": fingerprint(rounded), "the model": fingerprint(model)}
    assert len(set(marks.values())) == 1, f"one base, and so one fingerprint, was expected: {marks}"
    assert_close(
        logits(apply_adapter(quantize_model(make_base(torch.float32)), extract_adapter(model))), said, "applied", 1e-5
    )
    save_adapter(model, tmp_path)
    assert_close(logits(load_adapter(quantize_model(make_base(torch.float32)), tmp_path)), said, "loaded", 1e-5)
    with pytest.raises(ValueError, match="another base"):
        load_adapter(make_base(torch.float32), tmp_path)
    model(MANY).square().mean().backward()
    for parameter in adapter_parameters(model):
        assert parameter.grad.abs().max() > 0, "it can be trained on"
    taken = copy.deepcopy(model)
    remove_lora(taken)
    assert_close(logits(taken), logits(rounded), "taken out", 0)
    merge_lora(dequantize_model(model))
    assert_close(logits(model), said, "merged into the dequantized weights", 1e-5)


# What they refuse, before anything is changed


@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_layers_that_cannot_give_it_are_refused_and_the_model_stays(start):
    cases = {
        rf"'{start}' starts from W in floats, and model.layers.0.self_attn.q_proj is a Linear4bit; .*apply_loftq": (
            quantize_model(make_base()),
            dict(target_modules=["q_proj"]),
        ),
        rf"'{start}' cannot give r=17 directions of model.layers.0.self_attn.k_proj, which has 16": (
            make_base(),
            dict(target_modules=["q_proj", "k_proj"], r=17),
        ),
    }
    for message, (model, options) in cases.items():
        weights, said = weights_of(model), logits(model)
        with pytest.raises(ValueError, match=message):
            apply_lora(model, LoRAConfig(init_lora_weights=start, **options))
        assert_untouched(model, weights, "refused")
        assert torch.equal(logits(model), said) and not any(lora_layers(model)) and not hasattr(model, "lora_config")


@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_full_rank_is_not_refused(start):
    base, model = (
        make_base(),
        apply_lora(make_base(), LoRAConfig(r=16, target_modules=["k_proj"], init_lora_weights=start)),
    )
    assert_close(logits(model), logits(base), "logits at the start")


# An adapter loaded into layers that had another start


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("start", STARTS)
def test_a_plain_adapter_is_loaded_into_layers_of_any_start(tmp_path, start, use_dora):
    save_adapter(trained("gaussian", use_dora=use_dora), tmp_path)
    model, alone = started(start, use_dora=use_dora), load_adapter(make_base(), tmp_path)
    assert load_adapter(model, tmp_path) is model
    assert_close(logits(model), logits(alone), "loaded", 0)
    assert_untouched(model, weights_of(make_base()), "loaded")
    assert model.lora_config.init_lora_weights is True
    adapter = extract_adapter(model)
    ranks = {name: (len(adapter.A[name]), adapter.B[name].shape[1]) for name in adapter.A}
    assert set(ranks.values()) == {(3, 3)}, f"the ranks of A and B are {ranks}; 3 was loaded"
    assert adapter.config == alone.lora_config, f"{adapter.config}, expected {alone.lora_config}"
    for name in adapter.A:
        assert_close(adapter.A[name], alone.get_submodule(name).lora_A, f"{name}: A", 0)
    save_adapter(model, tmp_path / "again")
    configs, files = (
        [read(path / name) for path in (tmp_path, tmp_path / "again")]
        for read, name in ((Path.read_text, "adapter_config.json"), (load_file, "adapter_model.safetensors"))
    )
    assert configs[0] == configs[1]
    for name, tensor in files[0].items():
        assert torch.equal(files[1].pop(name), tensor), f"{name} is not as it was in the file that was loaded"
    assert not files[1], f"{list(files[1])} came into the file"
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.1)
    model(MANY).square().mean().backward()
    optimizer.step()
    assert_far(logits(model), logits(alone), "it can be trained on")


def test_loading_changes_the_start_of_this_model_s_config_and_of_no_other(tmp_path):
    save_adapter(trained(True), tmp_path)
    config = LoRAConfig(r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights="pissa", lora_dropout=0.25)
    model = load_adapter(apply_lora(make_base(), config), tmp_path)
    assert config.init_lora_weights == "pissa" and model.lora_config == replace(config, init_lora_weights=True)


def test_its_own_file_of_twice_the_rank_does_not_fit_the_layers_it_came_from(tmp_path):
    model = trained("pissa")
    save_adapter(model, tmp_path)
    said = logits(model)
    with pytest.raises(ValueError, match=r"r \(3 in the model, 6 in the file\)"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), said) and model.lora_config.init_lora_weights == "pissa"
    assert all(layer.start_A is not None for _, layer in lora_layers(model)), "the start was dropped"


def test_a_plain_start_does_not_matter_once_it_is_past(tmp_path):
    save_adapter(trained("gaussian"), tmp_path)
    path = tmp_path / "adapter_config.json"
    for start in ("orthogonal", "eva", False):  # of another library
        path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": start}))
        loaded = load_adapter(make_base(), tmp_path)
        assert torch.equal(logits(loaded), logits(trained("gaussian"))) and loaded.lora_config.init_lora_weights is True


def test_an_adapter_that_does_not_fill_a_layer_leaves_its_start_and_numbers():
    model, adapter = trained("pissa"), extract_adapter(trained(True))
    name, layer = next(lora_layers(model))
    before = {part: tensor.clone() for part, tensor in layer.state_dict().items()}
    for broken in (
        Adapter(adapter.config, {}, adapter.B),
        Adapter(adapter.config, adapter.A, {name: torch.zeros(1, 3)}),
    ):
        with pytest.raises(ValueError, match=f"{name} needs a lora_[AB] of shape"):
            broken.fill(name, layer)
        for part, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[part]), f"{part} was changed"
    adapter.fill(name, layer)
    assert layer.start_A is None and layer.start_B is None
    assert torch.equal(layer.lora_A, adapter.A[name]) and layer.lora_A.data_ptr() != adapter.A[name].data_ptr()


# LoftQ


def random_weights(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "normal":
        return torch.randn(64, 96, generator=generator)
    if kind == "heavy-tailed":  # Student's t with 2 degrees of freedom: some weights are far out, as in trained layers
        squares = torch.randn(2, 64, 96, generator=generator).square().mean(0)
        return torch.randn(64, 96, generator=generator) / squares.sqrt()
    low_rank = torch.randn(64, 4, generator=generator) @ torch.randn(4, 96, generator=generator)
    return low_rank + 0.1 * torch.randn(64, 96, generator=generator)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("scheme", ["nf4", "int4"])
@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "low rank"])
def test_loftq_is_never_worse_than_rounding_alone_and_keeps_its_best_round(kind, scheme, double_quant):
    W, quantization = random_weights(kind), Quantization(scheme, double_quant=double_quant)
    for r in (2, 16):
        Q, A, B, errors = loftq(W, r, 2.0, quantization, rounds=6)
        assert len(errors) == 7 and errors[1] < errors[0], f"r={r}: {errors}"
        kept = ((W - dequantize(Q) - 2 * B @ A).norm() / W.norm()).item()
        assert math.isclose(kept, min(errors[1:]), rel_tol=1e-4), f"r={r}: kept {kept} of {errors}"
        one = loftq(W, r, 2.0, quantization, rounds=1)[3]
        assert one == errors[:2], "rounds only add to what is there"


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "low rank"])
def test_more_rounds_of_loftq_help(kind):
    errors = loftq(random_weights(kind), 16, 1.0, rounds=5)[3]
    assert min(errors[2:]) < errors[1], errors


@pytest.mark.parametrize("options", ["plain", "rsLoRA", "patterns"])
def test_loftq_starts_nearer_to_the_float_model_than_rounding_does(options):
    base = make_base(torch.float32)
    config = LoRAConfig(r=8, lora_alpha=24, target_modules="all-linear", **OPTIONS[options])
    model, rounded = apply_loftq(make_base(torch.float32), config), quantize_model(make_base(torch.float32))
    for name, layer in lora_layers(model):
        W, Q = base.get_submodule(name).weight, rounded.get_submodule(name).quantized
        assert isinstance(layer.base_layer, Linear4bit)
        error = (W - dequantize(layer.base_layer.quantized) - layer.delta_weight()).norm()
        assert error < 0.8 * (W - dequantize(Q)).norm(), name
    errors = [(logits(m) - logits(base)).norm().item() for m in (model, rounded)]
    assert errors[0] < 0.8 * errors[1], errors
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.{part}" for name, _ in lora_layers(model) for part in ("lora_A", "lora_B")
    }


def test_loftq_quantizes_the_layers_without_an_adapter_too_and_leaves_the_head():
    model = apply_loftq(make_base(), LoRAConfig(r=2, target_modules=["q_proj", "lm_head"]))
    rounded = quantize_model(make_base())
    up = "model.layers.0.mlp.up_proj"
    assert torch.equal(model.get_submodule(up).codes, rounded.get_submodule(up).codes)
    assert type(model.lm_head.base_layer) is nn.Linear and not model.lm_head.lora_B.any()


def test_a_loftq_base_and_its_adapter_round_trip_and_fit_each_other_only(tmp_path):
    config = LoRAConfig(r=4, lora_alpha=12, target_modules="all-linear")
    model = apply_loftq(make_base(torch.float32), config)
    for parameter in adapter_parameters(model):
        parameter.data += 0.1
    said = logits(model)
    save_adapter(model, tmp_path / "adapter")
    remove_lora(model)
    save_model(model, tmp_path / "base")
    again = load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), said)
    for other in (make_base(torch.float32), quantize_model(make_base(torch.float32))):
        with pytest.raises(ValueError, match="another base"):
            load_adapter(other, tmp_path / "adapter")


def test_what_loftq_cannot_do_is_refused_before_anything_is_changed():
    def broken():
        model = make_base()
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
        return model

    q = dict(target_modules=["q_proj"])
    cases = [
        (make_base(), LoRAConfig(**q, use_dora=True), {}, "does not go together with use_dora"),
        (make_base(), LoRAConfig(**q, init_lora_weights="pissa"), {}, "together with init_lora_weights 'pissa'"),
        (make_base(), LoRAConfig(**q), dict(rounds=0), "rounds is 0"),
        (make_base(), LoRAConfig(r=17, target_modules=["k_proj"]), {}, "r=17 directions of .*k_proj, which has 16"),
        (make_base(), LoRAConfig(target_modules=["query"]), {}, "'query'"),
        (quantize_model(make_base()), LoRAConfig(**q), {}, "q_proj is in 4 bits already"),
        (started(True), LoRAConfig(**q), {}, "already has LoRA layers"),
        (broken(), LoRAConfig(**q), {}, "layers.1.mlp.up_proj.weight holds NaN"),
    ]
    for model, config, options, message in cases:
        before = {name: id(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match=message):
            apply_loftq(model, config, **options)
        assert {name: id(module) for name, module in model.named_modules()} == before, message


# EVA


def inputs_of_layers(model, batches):
    """What every LoRA layer gets to see, (tokens, in)."""
    seen = {name: [] for name, _ in lora_layers(model)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0].detach().flatten(0, -2)))
        for name, layer in lora_layers(model)
    ]
    for batch in batches:
        logits(model, batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("in_4_bits", [False, True])
@pytest.mark.parametrize("options", ["plain", "DoRA", "patterns"])
def test_eva_starts_from_the_right_singular_vectors_of_the_inputs(options, in_4_bits):
    base = quantize_model(make_base()) if in_4_bits else make_base()
    config = LoRAConfig(r=4, target_modules="all-linear", init_lora_weights="eva", **OPTIONS[options])
    batches = list(torch.randint(64, (3, 5, 16), generator=torch.Generator().manual_seed(2)))
    model = copy.deepcopy(base)
    assert apply_lora(model, config, iter(batches)) is model and model.lora_config is config
    assert_close(logits(model), logits(base), "logits at the start")
    for name, X in inputs_of_layers(model, batches).items():
        layer = model.get_submodule(name)
        vectors = torch.linalg.svd(X.double(), full_matrices=False).Vh[: layer.r]
        assert_close(
            (layer.lora_A.double() @ vectors.T).abs(), torch.eye(layer.r).double(), f"{name}: A, by sign", 1e-5
        )
        assert not layer.lora_B.any() and layer.start_A is None, name
    again = apply_lora(copy.deepcopy(base), config, torch.cat(batches))
    for (name, a), (_, b) in zip(lora_layers(model), lora_layers(again), strict=True):
        assert_close((a.lora_A @ b.lora_A.T).abs().double(), torch.eye(a.r).double(), f"{name}: at once", 1e-5)


def test_eva_looks_at_the_inputs_without_dropout():
    X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    model, linear = nn.Sequential(nn.Dropout(0.9), nn.Linear(6, 5)), nn.Linear(6, 5)
    vectors = torch.linalg.svd(X).Vh[:2]
    A = eva_directions(model, {"1": model[1]}, {"1": 2}, X)["1"]
    assert_close((A.float() @ vectors.T).abs(), torch.eye(2), "A, by sign", 1e-5)
    layer = FastLoRALinear(linear, 2, 4)
    start_layer(layer, "eva", A)
    assert_close(layer.lora_A, A.float(), "A of a layer", 0)


@pytest.mark.parametrize("training", [True, False])
def test_eva_leaves_the_model_s_mode_and_no_hooks(training):
    model = make_base().train(training)
    apply_lora(model, LoRAConfig(r=3, init_lora_weights="eva", lora_dropout=0.5), MANY)
    for name, module in model.named_modules():
        assert module.training == training and not module._forward_pre_hooks, name


def test_eva_without_data_or_with_too_little_is_refused_and_nothing_changes():
    cases = {
        r"'eva' starts from data: apply_lora\(model, config, batches\) takes it": None,
        r"0 tokens of 32 features cannot give r=3 directions for model.layers.0.self_attn.q_proj": [],
        r"2 tokens of 32 features cannot give r=3 directions for model.layers.0.self_attn.q_proj": MANY[:1, :2],
    }
    for message, batches in cases.items():
        model = make_base().train()
        weights, modules = weights_of(model), {name: id(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match=message):
            apply_lora(model, LoRAConfig(r=3, target_modules="all-linear", init_lora_weights="eva"), batches)
        assert {name: id(module) for name, module in model.named_modules()} == modules, f"{message}: layers changed"
        assert_untouched(model, weights, message)
        assert not hasattr(model, "lora_config") and all(p.requires_grad for p in model.parameters()), message
        assert all(module.training and not module._forward_pre_hooks for module in model.modules()), message
    with pytest.raises(ValueError, match=r"64 tokens of 32 features cannot give r=33"):
        apply_lora(make_base(), LoRAConfig(r=33, target_modules=["q_proj"], init_lora_weights="eva"), MANY)


def test_batches_are_for_eva_alone_and_the_others_do_not_look_at_them():
    for start in STARTS:
        if start != "eva":
            assert any(
                lora_layers(apply_lora(make_base(), LoRAConfig(init_lora_weights=start), iter(lambda: 1 / 0, 1)))
            )


# LoRA-FA


@pytest.mark.parametrize("options", [{}, dict(use_dora=True), dict(lora_dropout=0.1), dict(init_lora_weights="pissa")])
def test_a_model_with_a_frozen_trains_b_and_is_saved_and_merged_as_any_other(tmp_path, options):
    model = freeze_A(apply_lora(make_base(torch.float32), LoRAConfig(r=3, target_modules="all-linear", **options)))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    config = TrainConfig(steps=1, batch_size=1, learning_rate=0.1)
    optimizer = make_optimizer(model, config, loraplus_groups(model, 0.01))
    for _ in range(2):
        model(MANY).square().mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not name.endswith(("lora_B", "lora_magnitude_vector"))), name
    save_adapter(model.eval(), tmp_path)
    said = logits(model)
    assert_close(logits(load_adapter(make_base(torch.float32).eval(), tmp_path)), said, "loaded", 1e-4)
    merge_lora(model)
    assert_close(logits(model), said, "merged", 1e-4)
    with pytest.raises(ValueError, match="no LoRA layers"):
        freeze_A(make_base())


# rsLoRA


def test_rslora_is_lora_times_the_root_of_r():
    for r in (1, 4, 9, 64, 256):
        linear = nn.Linear(8, 8)
        assert LoRALinear(linear, r, 4, use_rslora=True).scaling == LoRALinear(linear, r, 4).scaling * math.sqrt(r)


def test_the_output_of_rslora_keeps_its_size_with_r_and_that_of_lora_shrinks():
    """A and B of entries whose size does not depend on r, as a step of Adam leaves them."""

    def size(r, use_rslora):
        torch.manual_seed(r)
        layer = LoRALinear(nn.Linear(384, 384), r, 16, use_rslora=use_rslora)
        nn.init.normal_(layer.lora_A, std=384**-0.5)
        nn.init.normal_(layer.lora_B)
        x = torch.randn(64, 384)
        return (layer(x) - layer.base_layer(x)).square().mean().sqrt().item()

    for use_rslora, expected in ((True, 1), (False, 1 / 8)):
        ratio = size(256, use_rslora) / size(4, use_rslora)
        assert abs(ratio / expected - 1) < 0.2, f"from r=4 to 256 the output changes by {ratio}, not {expected}"


def test_energy_rank_is_the_fewest_that_hold_the_share():
    values = torch.tensor([4.0, 2.0, 2.0, 1.0])  # energy 16 + 4 + 4 + 1 = 25
    shares = {0.5: 1, 0.64: 1, 0.65: 2, 0.8: 2, 0.96: 3, 0.97: 4, 1.0: 4}
    found = {share: energy_rank(values, share) for share in shares}
    assert found == shares, f"expected {shares}, got {found}"
    assert energy_rank(torch.zeros(3), 0.9) == 1
    many = torch.rand(500, generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    r = energy_rank(many, 0.9)
    held = many.double().square().cumsum(0) / many.double().square().sum()
    assert held[r - 2] < 0.9 <= held[r - 1], f"r = {r} holds {held[r - 1]}, one less {held[r - 2]}"
    for share in (0, 1.01, -0.5):
        with pytest.raises(ValueError, match="share is"):
            energy_rank(values, share)
