"""Other starts for A and B: what each promises, in float64, with A and B random where training would move them."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
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
    train,
    unmerge_lora,
)
from minilora.adapters.combine import concatenate
from minilora.adapters.factors import energy_rank, loftq, olora, pissa
from minilora.adapters.inject import adapter_parameters, apply_adapter, extract_adapter, lora_layers, remove_lora
from minilora.adapters.starts import apply_loftq, eva_start, freeze_A
from minilora.adapters.swap import AdapterShelf
from minilora.adapters.variants import loraplus_groups
from minilora.inference.bank import AdapterBank
from minilora.lora import LoRALinear, LowRankTerm
from minilora.quant import Linear4bit, dequantize, dequantize_model, quantize_model
from minilora.storage.models import fingerprint
from minilora.train import make_optimizer

FEW, MANY = torch.arange(8).view(1, 8), torch.arange(64).view(4, 16)  # below and above a layer's width in tokens
MOVING = ["pissa", "olora"]  # starts that move a part of W into the adapter
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
    return apply_lora(make_base(dtype), LoRAConfig(**{**config, **options}))


def trained(start, dtype=torch.float64, **options):
    """As if trained: A, B and magnitudes have moved, by float32's values."""
    model = started(start, dtype, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(dtype)
        parameter.data.copy_(parameter.data.float())
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


# PiSSA and OLoRA: a part of W moves into the adapter


@pytest.mark.parametrize("ids", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("start", MOVING)
def test_the_model_starts_as_the_base_though_every_weight_changed(start, options, ids):
    base, model = make_base(), started(start, **OPTIONS[options])
    assert_close(logits(model, ids), logits(base, ids), "logits at the start")
    for name, layer in lora_layers(model):
        assert_far(layer.base_layer.weight, base.get_submodule(name).weight, name)
        assert not layer.delta_weight().abs().max() > 1e-10, "nothing was trained yet"


def test_pissa_puts_the_largest_singular_values_into_the_adapter():
    base, model = make_base(), started("pissa")
    for name, layer in lora_layers(model):
        S = torch.linalg.svdvals(base.get_submodule(name).weight)
        assert_close(torch.linalg.svdvals(layer.update())[:3], S[:3], f"{name}: in the adapter", 1e-6)
        assert_close(torch.linalg.svdvals(layer.base_layer.weight)[0], S[3], f"{name}: left in the base", 1e-6)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("start", MOVING)
def test_disabled_is_the_original_model_merged_or_not(start, options, merged):
    base, model = make_base(), trained(start, **OPTIONS[options])
    said = logits(model)
    assert_far(said, logits(base), "trained")
    if merged:
        merge_lora(model)
    with disable_lora(model):
        for ids in (FEW, MANY):
            assert_close(logits(model, ids), logits(base, ids), "disabled")
    assert_close(logits(model), said, "enabled again")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("start", MOVING)
def test_merge_adds_to_what_is_left_and_unmerge_restores_its_bits(start, options):
    base, model = make_base(), trained(start, **OPTIONS[options])
    said, before = logits(model), {name: layer.base_layer.weight.clone() for name, layer in lora_layers(model)}
    delta = {name: layer.delta_weight().detach() for name, layer in lora_layers(model)}
    merge_lora(model)
    assert_close(logits(model), said, "merged")
    for name, layer in lora_layers(model):
        assert_close(layer.base_layer.weight - base.get_submodule(name).weight, delta[name], f"{name}: ΔW")
        assert_close(layer.delta_weight(), delta[name], f"{name}: ΔW while merged")
    unmerge_lora(model)
    assert all(torch.equal(layer.base_layer.weight, before[name]) for name, layer in lora_layers(model))


def test_delta_weight_is_the_difference_of_the_two_products():
    layer = dict(lora_layers(trained("pissa")))["model.layers.0.mlp.up_proj"]
    s, A, B, A0, B0 = layer.scaling, layer.lora_A, layer.lora_B, layer.start_A, layer.start_B
    assert_close(layer.delta_weight(), s * (B @ A - B0 @ A0), "ΔW")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("start", MOVING)
def test_it_is_saved_as_plain_lora_of_twice_the_rank_on_the_original_base(tmp_path, start, options):
    base, model = make_base(), trained(start, **OPTIONS[options])
    assert fingerprint(model) == fingerprint(base)
    save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["r"] == 6 and settings["init_lora_weights"] is True
    loaded = load_adapter(make_base(), tmp_path)  # refused if it named another base
    for ids in (FEW, MANY):
        assert_close(logits(loaded, ids), logits(model, ids), "loaded on the original base")
    for (name, layer), (_, started_layer) in zip(lora_layers(loaded), lora_layers(model), strict=True):
        assert layer.r == 2 * started_layer.r and math.isclose(layer.scaling, started_layer.scaling), name
    merge_lora(model)
    save_adapter(model, tmp_path / "merged")
    merged = load_adapter(make_base(), tmp_path / "merged")
    assert torch.equal(logits(merged), logits(loaded)), "merged or not, the adapter is the same"


@pytest.mark.parametrize("start", MOVING)
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
    assert_close(logits(model), said, "the adapter is a copy")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", MOVING)
def test_removing_gives_w_back_up_to_rounding(start, dtype):
    base, model = make_base(dtype), trained(start, dtype)
    left = {name: layer.base_layer.weight.clone() for name, layer in lora_layers(model)}
    remove_lora(model)
    assert not any(lora_layers(model)) and not hasattr(model, "lora_config")
    step = torch.finfo(dtype).eps / 2  # rounding to nearest, relative; once at the start and once now
    for name, weight in left.items():
        W, got = base.get_submodule(name).weight.double(), model.get_submodule(name).weight.double()
        bound = 1.01 * step * (weight.double().abs() + W.abs()) + 16 * torch.finfo(torch.float32).eps * (
            dtype.itemsize < 8
        )
        assert ((got - W).abs() <= bound + 1e-14).all(), name


@pytest.mark.parametrize("start", MOVING)
def test_on_a_bfloat16_base_the_start_is_off_by_one_rounding_of_what_is_left(start):
    base, model = make_base(torch.bfloat16), started(start, torch.bfloat16)
    for name, layer in lora_layers(model):
        assert (
            layer.lora_A.dtype == layer.start_A.dtype == torch.float32
            and layer.base_layer.weight.dtype == torch.bfloat16
        )
        W, left = base.get_submodule(name).weight.float(), layer.base_layer.weight.float()
        error = (left + layer.update() - W).abs()
        assert (error <= 2**-8 * left.abs() + 1e-5).all(), f"{name}: off by {error.max()}"
        assert error.max() > 1e-5, "and not exact, as in float32"


@pytest.mark.parametrize("start", MOVING)
def test_what_it_remembers_is_as_small_as_the_adapter(start):
    def numbers(model):
        return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))

    model, saved = started(start), []
    expected = sum(3 * (layer.in_features + layer.out_features) for _, layer in lora_layers(model))
    assert numbers(model) - numbers(started(True)) == expected
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model(MANY)
    weights = {layer.base_layer.weight.data_ptr() for _, layer in lora_layers(model)}
    for name, layer in lora_layers(model):
        large = {t.data_ptr() for t in saved if t.shape == layer.base_layer.weight.shape}
        assert large <= weights, f"{name}: a second W is kept for backward"


@pytest.mark.parametrize("start", MOVING)
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


@pytest.mark.parametrize("start", MOVING)
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
    with pytest.raises(ValueError, match="frozen_digest"):
        train(started("gaussian", torch.float32), data, config, state_path=state, resume=True, progress=False)


# What they refuse, before anything is changed


@pytest.mark.parametrize("start", MOVING)
def test_weights_that_cannot_change_are_refused_and_the_model_stays(start):
    cases = {
        r"changes the weight of lm_head, which model.embed_tokens and lm_head share": (
            make_base(tied=True),
            dict(target_modules=["q_proj", "lm_head"]),
        ),
        r"takes a part of W out of model.layers.0.self_attn.q_proj, which is a Linear4bit: .*apply_loftq": (
            quantize_model(make_base()),
            dict(target_modules=["q_proj"]),
        ),
        r"cannot give r=17 directions of model.layers.0.self_attn.k_proj, which has 16": (
            make_base(),
            dict(target_modules=["q_proj", "k_proj"], r=17),
        ),
    }
    for message, (model, options) in cases.items():
        said = logits(model)
        with pytest.raises(ValueError, match=message):
            apply_lora(model, LoRAConfig(init_lora_weights=start, **options))
        assert torch.equal(logits(model), said) and not any(lora_layers(model))


def test_an_adapter_is_not_loaded_into_layers_whose_base_changed(tmp_path):
    save_adapter(trained(True), tmp_path)
    model = started("pissa")
    with pytest.raises(ValueError, match="start from pissa, which changed the base"):
        load_adapter(model, tmp_path)
    assert_close(logits(model), logits(make_base()), "the model as it was")


def test_a_plain_start_does_not_matter_once_it_is_past(tmp_path):
    save_adapter(trained("gaussian"), tmp_path)
    assert torch.equal(logits(load_adapter(started(True), tmp_path)), logits(trained("gaussian")))
    assert torch.equal(logits(load_adapter(started("eva"), tmp_path)), logits(trained("gaussian")))
    path = tmp_path / "adapter_config.json"
    for start in ("orthogonal", "eva", False):  # of another library
        path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": start}))
        loaded = load_adapter(make_base(), tmp_path)
        assert torch.equal(logits(loaded), logits(trained("gaussian"))) and loaded.lora_config.init_lora_weights is True


def test_put_into_4_bits_after_the_start_it_can_be_trained_and_merged_but_not_taken_apart(tmp_path):
    model = quantize_model(trained("pissa", torch.float32))
    said = logits(model)
    for refused in (lambda: save_adapter(model, tmp_path), lambda: extract_adapter(model), lambda: remove_lora(model)):
        with pytest.raises(ValueError, match="q_proj was put into 4 bits after its start"):
            refused()
    merge_lora(dequantize_model(model))
    assert_close(logits(model), said, "merged", 1e-5)


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
    W = random_weights(kind)
    for r in (2, 16):
        Q, A, B, errors = loftq(W, r, 2.0, scheme, double_quant=double_quant, rounds=6)
        assert len(errors) == 7 and errors[1] < errors[0], f"r={r}: {errors}"
        kept = ((W - dequantize(Q) - 2 * B @ A).norm() / W.norm()).item()
        assert math.isclose(kept, min(errors[1:]), rel_tol=1e-4), f"r={r}: kept {kept} of {errors}"
        one = loftq(W, r, 2.0, scheme, double_quant=double_quant, rounds=1)[3]
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
        error = (W - dequantize(layer.base_layer.quantized) - layer.update()).norm()
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
        (make_base(), LoRAConfig(**q), dict(scheme="nf3"), "unknown scheme 'nf3'"),
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
    model = apply_lora(copy.deepcopy(base), config)
    batches = list(torch.randint(64, (3, 5, 16), generator=torch.Generator().manual_seed(2)))
    assert eva_start(model, iter(batches)) is model
    assert_close(logits(model), logits(base), "logits at the start")
    for name, X in inputs_of_layers(model, batches).items():
        layer = model.get_submodule(name)
        vectors = torch.linalg.svd(X.double(), full_matrices=False).Vh[: layer.r]
        assert_close(
            (layer.lora_A.double() @ vectors.T).abs(), torch.eye(layer.r).double(), f"{name}: A, by sign", 1e-5
        )
    again = eva_start(apply_lora(copy.deepcopy(base), config), torch.cat(batches))
    for (name, a), (_, b) in zip(lora_layers(model), lora_layers(again), strict=True):
        assert_close((a.lora_A @ b.lora_A.T).abs().double(), torch.eye(a.r).double(), f"{name}: at once", 1e-5)


def test_eva_looks_at_the_inputs_without_dropout():
    X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    model = apply_lora(nn.Sequential(nn.Dropout(0.9), nn.Linear(6, 5)), LoRAConfig(r=2, target_modules=["1"]))
    vectors = torch.linalg.svd(X).Vh[:2]
    assert_close((eva_start(model, X)[1].lora_A @ vectors.T).abs(), torch.eye(2), "A, by sign", 1e-5)


def test_eva_leaves_the_model_s_mode_and_no_hooks_and_refuses_what_it_cannot_use():
    model = started("eva", lora_dropout=0.5)
    model.train()
    eva_start(model, MANY)
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="no LoRA layers to start"):
        eva_start(make_base(), MANY)
    with pytest.raises(ValueError, match="q_proj has a B that is not 0"):
        eva_start(started("pissa"), MANY)
    for batches in ([], MANY[:1, :2]):
        with pytest.raises(ValueError, match=r"[02] tokens of 32 features cannot give r=3 directions for .*q_proj"):
            eva_start(started("eva"), batches)


# LoRA-FA


def wrapped_linear(dropout=0.0, frozen=True):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False), 2, 3.0, dropout)
    nn.init.normal_(layer.lora_A).requires_grad_(not frozen)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_with_a_frozen(masked):
    layer, x = wrapped_linear(), torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    base, mask = torch.randn(3, 4, 5, dtype=torch.float64), torch.rand(3, 4, 6) < 0.6 if masked else None
    assert torch.autograd.gradcheck(
        lambda x, B: LowRankTerm.apply(base, x, layer.lora_A, B, 1.5, mask), (x, layer.lora_B)
    )


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("tokens", [3, 50])
def test_with_a_frozen_its_gradient_is_not_computed_and_x_is_not_kept(tokens, dropout):
    x, grads = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True), {}
    for frozen in (True, False):
        layer, saved = wrapped_linear(dropout, frozen), {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(1)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        assert (x.data_ptr() in saved) != frozen
        for parameter in layer.parameters():
            saved.pop(parameter.data_ptr(), None)
        if frozen:
            assert sum(saved.values()) == tokens * (2 * 8 + 6 * bool(dropout)), "A x, and the mask of dropout"
        x.grad = None
        y.square().sum().backward()
        assert (layer.lora_A.grad is None) == frozen
        grads[frozen] = x.grad, layer.lora_B.grad
    for name, a, b in zip(("x", "B"), grads[True], grads[False], strict=True):
        assert_close(a, b, f"gradient of {name}")


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
