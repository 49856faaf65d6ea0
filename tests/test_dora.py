"""DoRA against its formula, in float64 with random A, B and m; and LoRA+'s groups."""

import copy

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
    load_adapter,
    loraplus_groups,
    merge_lora,
    save_adapter,
    unmerge_lora,
)
from minilora.adapters.adapter import apply_adapter, extract_adapter
from minilora.adapters.combine import concatenate
from minilora.adapters.dora import DoRALinear
from minilora.adapters.inject import adapter_parameters, lora_layers
from minilora.adapters.swap import AdapterShelf
from minilora.fast import FastLoRALinear, dropout_mask
from minilora.linear4bit import dequantize_model, quantize_model
from minilora.train import make_optimizer

FEW, MANY = (2,), (3, 7)  # leading dimensions with fewer and more tokens than 2·in·out / (in + out) = 5.5
IDS = torch.arange(36).view(3, 12)


def make_layer(dropout=0.0, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(6, 5, bias=bias, dtype=dtype).requires_grad_(False), 2, 3.0, dropout)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    layer.lora_magnitude_vector.data += 0.3 * torch.randn(5, dtype=layer.lora_magnitude_vector.dtype)
    return layer


def direction(layer):
    """g ⊙ (W + sBA), the norm a constant, as autograd sees the formula written out."""
    V = layer.base_layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    return (layer.lora_magnitude_vector / V.detach().norm(dim=1))[:, None] * V


def small_gpt(dtype=torch.float64):
    torch.manual_seed(0)
    return GPT(GPTConfig(64, 32, 48, 2, 4, 2, max_position_embeddings=16)).to(dtype)


def random_dora(model, **options):
    apply_lora(model, LoRAConfig(r=2, lora_alpha=6, target_modules="all-linear", use_dora=True, **options))
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        for parameter in layer.parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            parameter.data = noise * 0.2 + (parameter.data if parameter.ndim == 1 else 0)
    return model


def assert_close(got, expected, what, tolerance=1e-10):
    difference = (got - expected).abs().max().item()
    assert difference <= tolerance, f"{what}: off by {difference:.2e}"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_output_and_gradients_are_the_formula_s(tokens, bias):
    layer = make_layer(bias=bias)
    x = torch.randn(*tokens, 6, dtype=torch.float64, requires_grad=True)
    assert layer.forming_pays(x) == (tokens == MANY)
    inputs = x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    expected = nn.functional.linear(x, direction(layer), layer.base_layer.bias)
    weights = torch.randn_like(expected)
    assert_close(layer(x), expected, "output")
    gradients = [torch.autograd.grad((y * weights).sum(), inputs) for y in (layer(x), expected)]
    for name, got, right in zip(("x", "A", "B", "m"), *gradients, strict=True):
        assert_close(got, right, f"gradient of {name}")


def test_it_starts_as_the_layer_it_wraps():
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    x = torch.randn(3, 7, 6)
    assert_close(DoRALinear(base, 2, 3.0)(x), base(x), "at the start", 1e-6)


@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["few", "many"])
def test_a_row_of_zeros_is_no_number_divided_by_zero(tokens):
    """As pruning leaves them. The row is 0 at the start and stays so, and the other rows are trained."""
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5).double().requires_grad_(False), torch.randn(*tokens, 6, dtype=torch.float64)
    base.weight[1] = 0
    layer = DoRALinear(base, 2, 3.0)
    assert_close(layer(x), base(x), "at the start", 1e-12)
    for _ in range(3):
        layer(x).square().sum().backward()
        for name, parameter in [(n, p) for n, p in layer.named_parameters() if p.requires_grad]:
            assert parameter.grad.isfinite().all(), f"{tokens} tokens: gradient of {name} is {parameter.grad}"
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None
    assert_close(layer(x)[..., 1], base(x)[..., 1], "the row of zeros after three steps", 1e-12)
    assert (layer(x) - base(x))[..., 2].abs().max() > 1e-3, "the other rows are trained"
    assert layer.delta_weight().isfinite().all()


def test_norms_by_the_skinny_identity():
    layer = make_layer()
    V = layer.base_layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    assert_close(layer.norms(), V.norm(dim=1), "row norms")


def test_an_update_that_cancels_the_weight_has_norms_that_are_numbers():
    """‖W‖² + 2s⟨W, BA⟩ + s²‖BA‖² is 0 but for rounding, and half of the rows are below it."""
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(8, 64), 8, 8.0)
    layer.lora_A.data, layer.lora_B.data = torch.linalg.qr(torch.randn(8, 8))[0], torch.empty(64, 8)
    layer.lora_B.data = -layer.base_layer.weight.data @ layer.lora_A.data.T
    norms = layer.norms()
    assert norms.isfinite().all(), f"{(~norms.isfinite()).sum()} of 64 norms are no numbers"


def test_autocast_does_not_round_the_norms():
    layer = make_layer(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        norms = layer.norms()
    off = (norms - layer.norms()).abs().max().item()
    assert norms.dtype == torch.float32 and off == 0, f"under autocast the norms are {norms.dtype}, off by {off:.1e}"


def test_with_dropout_the_base_keeps_the_undropped_input():
    """W x + b + (g - 1) ⊙ (W x_d) + g ⊙ s·BA x_d, with the very mask that was drawn; gradients by autograd."""
    layer = make_layer(dropout=0.4).train()
    x = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    got = layer(x)
    torch.manual_seed(5)
    mask, kept = dropout_mask(x, 0.4)
    dropped = x * mask / kept
    W, s = layer.base_layer.weight, layer.scaling
    g = layer.lora_magnitude_vector / layer.norms()
    expected = layer.base_layer(x) + (g - 1) * (dropped @ W.T) + g * s * (dropped @ layer.lora_A.T @ layer.lora_B.T)
    assert_close(got, expected, "output")
    inputs = x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weights).sum(), inputs) for y in (got, expected)]
    for name, a, b in zip(("x", "A", "B", "m"), *gradients, strict=True):
        assert_close(a, b, f"gradient of {name}")


def test_nothing_as_large_as_the_weight_is_saved_for_backward_but_the_weight():
    layer, saved = make_layer(), []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(*MANY, 6, dtype=torch.float64))
    large = [tensor for tensor in saved if tensor.shape == layer.base_layer.weight.shape]
    others = sum(tensor.data_ptr() != layer.base_layer.weight.data_ptr() for tensor in large)
    assert not others, f"{others} tensors of W's shape that are not W are kept for backward; none is expected"


@pytest.mark.parametrize("bias", [True, False])
def test_merge_says_the_same_and_unmerge_restores_the_bits(bias):
    layer = make_layer(bias=bias)
    x, before = torch.randn(*MANY, 6, dtype=torch.float64), layer.base_layer.weight.clone()
    said, delta = layer(x), layer.delta_weight()
    layer.merge()
    assert_close(layer(x), said, "merged")
    assert_close(layer.base_layer.weight, before + delta, "ΔW")
    assert_close(layer.delta_weight(), delta, "ΔW while merged")
    layer.enabled = False
    assert_close(layer(x), nn.functional.linear(x, before, layer.base_layer.bias), "disabled while merged")
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_magnitude_is_float32_on_a_half_precision_base():
    layer = make_layer(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in layer.parameters(recurse=False)} == {torch.float32}
    x = torch.randn(*MANY, 6).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    expected = nn.functional.linear(x.float(), direction(layer).float(), layer.base_layer.bias.float())
    assert_close(layer(x).float(), expected, "output in bfloat16", 0.2)


def test_on_a_base_in_4_bits_it_is_dora_on_the_dequantized_one():
    rounded = random_dora(quantize_model(small_gpt()))
    plain = dequantize_model(copy.deepcopy(rounded))
    assert_close(rounded(IDS), plain(IDS), "output", 1e-6)
    gradients = [torch.autograd.grad(model(IDS).pow(2).sum(), adapter_parameters(model)) for model in (rounded, plain)]
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, "gradient", 1e-4 * b.abs().max().item())


def test_a_base_put_into_4_bits_afterwards_is_the_same_as_before():
    after, before = quantize_model(random_dora(small_gpt())), random_dora(quantize_model(small_gpt()))
    for parameter, numbers in zip(adapter_parameters(before), adapter_parameters(after), strict=True):
        parameter.data.copy_(numbers)
    assert_close(after(IDS), before(IDS), "output", 1e-5)  # beside 4 bits A and B are float32


@pytest.mark.parametrize("pattern", [{}, {"q_proj": 3}])
def test_round_trip_through_files_and_adapters(tmp_path, pattern):
    model = random_dora(small_gpt(torch.float32), rank_pattern=pattern)
    save_adapter(model, tmp_path)
    again, applied = load_adapter(small_gpt(torch.float32), tmp_path), small_gpt(torch.float32)
    apply_adapter(applied, extract_adapter(model))
    for name, copied in (("loaded", again), ("applied", applied)):
        assert all(
            torch.equal(a, b) for a, b in zip(adapter_parameters(model), adapter_parameters(copied), strict=True)
        )
        assert torch.equal(copied(IDS), model(IDS)), name
    with pytest.raises(ValueError, match="use_dora"):
        load_adapter(apply_lora(small_gpt(), LoRAConfig(r=2, lora_alpha=6, target_modules="all-linear")), tmp_path)


def test_merge_lora_on_a_model():
    model = random_dora(small_gpt())
    said = model(IDS)
    merge_lora(model)
    assert_close(model(IDS), said, "merged")
    unmerge_lora(model)
    assert torch.equal(model(IDS), said)


def test_loraplus_shares_out_every_trainable_parameter():
    for model in (random_dora(small_gpt()), apply_lora(small_gpt(), LoRAConfig(r=2))):
        model.model.embed_tokens.requires_grad_(True)
        slow, fast = loraplus_groups(model, lr=1e-3, ratio=8)
        assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)
        A = [layer.lora_A for _, layer in lora_layers(model)]
        names = {parameter: name for name, parameter in model.named_parameters()}
        found, expected = (
            {names[p] for p in group} for group in (slow["params"], [model.model.embed_tokens.weight, *A])
        )
        assert found == expected, (
            f"slow are {sorted(found)}; expected were the embeddings and every A: {sorted(expected)}"
        )
        config = TrainConfig(steps=1, batch_size=1, learning_rate=1e-3)
        assert make_optimizer(model, config, [slow, fast]), "which refuses a parameter left out, frozen or in both"


def test_loraplus_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="no LoRA layers"):
        loraplus_groups(small_gpt(), lr=1e-3)
    with pytest.raises(ValueError, match="ratio 0; both must be above 0"):
        loraplus_groups(apply_lora(small_gpt(), LoRAConfig(r=2)), lr=1e-3, ratio=0)


def test_plain_lora_stays_plain():
    layers = [layer for _, layer in lora_layers(apply_lora(small_gpt(), LoRAConfig(r=2)))]
    assert {type(layer) for layer in layers} == {FastLoRALinear}


def test_what_cannot_hold_a_magnitude_says_so():
    adapter = extract_adapter(random_dora(small_gpt()))
    with pytest.raises(ValueError, match="DoRA"):
        concatenate([adapter], [1.0])
    shelf = AdapterShelf(model := small_gpt())
    shelf.add("m", adapter)
    shelf.switch("m")
    assert torch.equal(model(IDS), random_dora(small_gpt())(IDS))


def test_an_adapter_that_does_not_fit_leaves_the_model_plain():
    adapter, model = extract_adapter(random_dora(small_gpt())), small_gpt()
    said = model(IDS)
    adapter.magnitude.pop("model.layers.1.mlp.up_proj")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj needs a lora_magnitude_vector of shape \(48,\)"):
        apply_adapter(model, adapter)
    assert not any(lora_layers(model)) and torch.equal(model(IDS), said)
