"""One LoRA layer, the plain class, against its formula.

A and B are random, and in float64 where numbers are compared: a B of zeros hides a missing scale or a wrong merge.
What both classes promise (merging, disabling, starting) is asked of both; `test_fast.py` holds the fast to the plain.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from minilora.config import STARTS, LoRAConfig, lora_scaling
from minilora.fast import FastLoRALinear
from minilora.lora import LoRALinear

IN, OUT, R = 6, 5, 2
FEW, MANY = (2,), (3, 7)  # leading dimensions with fewer and more tokens than 2·in·out / (in + out) = 5.5

both = pytest.mark.parametrize("kind", [LoRALinear, FastLoRALinear])
with_and_without_start = pytest.mark.parametrize("started", [False, True], ids=["B from 0", "from A0 and B0"])


def make_layer(
    kind=LoRALinear,
    dtype=torch.float64,
    dropout=0.0,
    bias=True,
    started=False,
    in_features=IN,
    out_features=OUT,
    **more,
):
    """A frozen nn.Linear in a layer with random A and B, and as if it had started from random A0 and B0."""
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features, bias=bias, dtype=dtype).requires_grad_(False)
    layer = kind(base, R, 3.0, dropout, **more)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    if started:
        layer.start_A = torch.randn_like(layer.lora_A)
        layer.start_B = torch.randn_like(layer.lora_B)
    return layer


def delta_of(layer):
    """s·BA, or s·(BA - B0A0), written out, in A's dtype."""
    product = layer.lora_B @ layer.lora_A
    if layer.start_A is not None:
        product = product - layer.start_B @ layer.start_A
    return layer.scaling * product


def written_out(layer, x, dropped=None):
    """W x + b + ΔW x_d."""
    base = layer.base_layer
    return F.linear(x, base.weight, base.bias) + (x if dropped is None else dropped) @ delta_of(layer).T


def gradients(output, *inputs):
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)  # differs for every element
    return torch.autograd.grad((output * weights).sum(), inputs)


def assert_close(got, expected, what):
    torch.testing.assert_close(got, expected, msg=lambda message: f"{what}: {message}")


def assert_same(got, expected, what):
    """Bit for bit."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, (
        f"{what}: {got.dtype} {tuple(got.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    )
    off = (got.double() - expected.double()).abs()
    assert torch.equal(got, expected), (
        f"{what}: {int((off > 0).sum())} of {off.numel()} numbers differ, by {off.max():.1e} at most; none may"
    )


class OtherLinear(nn.Module):
    """A base that is not an nn.Linear and holds its weight in a buffer, as a quantized layer does."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", linear.weight.detach().clone())
        self.register_buffer("shift", linear.bias.detach().clone())

    def forward(self, x):
        return F.linear(x, self.codes, self.shift)


# The formula


@with_and_without_start
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), FEW, (2, 1, 2), MANY, (2, 3, 2, 2), (0,)], ids=str)
def test_layer_equals_formula_forward_and_backward(leading, bias, started):
    layer = make_layer(bias=bias, started=started)
    x = torch.randn(*leading, IN, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.lora_A, layer.lora_B)
    got, expected = layer(x), written_out(layer, x)
    assert_close(got, expected, "output")
    for name, a, b in zip("xAB", gradients(got, *inputs), gradients(expected, *inputs), strict=True):
        assert_close(a, b, f"gradient of {name}")


@with_and_without_start
@pytest.mark.parametrize("leading", [FEW, MANY], ids=str)
def test_dropout_equals_the_formula_on_the_dropped_input(leading, started):
    p = 0.4
    layer = make_layer(dropout=p, started=started)
    x = torch.randn(*leading, IN, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    got = layer(x)
    torch.manual_seed(1)
    scale = F.dropout(torch.ones_like(x), p, True)
    assert set(scale.unique().tolist()) == {0.0, 1 / (1 - p)}, f"the mask holds {scale.unique().tolist()}"
    expected = written_out(layer, x, x * scale)
    assert_close(got, expected, "output")
    inputs = (x, layer.lora_A, layer.lora_B)
    for name, a, b in zip("xAB", gradients(got, *inputs), gradients(expected, *inputs), strict=True):
        assert_close(a, b, f"gradient of {name}")
    layer.eval()
    assert_close(layer(x), written_out(layer, x), "output in eval mode, where nothing is dropped")


@with_and_without_start
def test_factors_are_a_and_b_or_both_pairs_with_the_start_taken_off(started):
    layer = make_layer(started=started)
    A, B = layer.factors()
    if not started:
        assert A is layer.lora_A and B is layer.lora_B
        return
    assert_same(A.detach(), torch.cat([layer.lora_A.detach(), layer.start_A], dim=0), "A over A0")
    assert_same(B.detach(), torch.cat([layer.lora_B.detach(), -layer.start_B], dim=1), "B beside -B0")
    assert A.requires_grad and B.requires_grad


@with_and_without_start
def test_delta_weight_is_what_the_layer_adds(started):
    layer = make_layer(started=started)
    x = torch.randn(*MANY, IN, dtype=torch.float64)
    assert_close(layer.delta_weight(), delta_of(layer), "ΔW")
    assert_close(layer(x) - layer.base_layer(x), x @ layer.delta_weight().T, "what the layer adds to W x + b")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert layer.to(dtype).delta_weight().dtype == torch.float32


@pytest.mark.parametrize("leading", [FEW, MANY], ids=str)
def test_any_base_layer_with_in_and_out_features(leading):
    plain = make_layer()
    layer = LoRALinear(OtherLinear(plain.base_layer), R, 3.0)
    assert layer.lora_A.dtype == torch.float64, "A takes its dtype from a buffer, where there is no parameter"
    layer.lora_A, layer.lora_B = plain.lora_A, plain.lora_B
    x = torch.randn(*leading, IN, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.lora_A, layer.lora_B)
    for name, a, b in zip("xAB", gradients(layer(x), *inputs), gradients(written_out(plain, x), *inputs), strict=True):
        assert_close(a, b, f"gradient of {name}")
    with pytest.raises(ValueError, match="OtherLinear"):
        layer.merge()


def test_a_base_that_is_not_frozen_gets_its_gradients():
    layer = make_layer()
    layer.base_layer.requires_grad_(True)
    x = torch.randn(*MANY, IN, dtype=torch.float64)
    inputs = (layer.base_layer.weight, layer.base_layer.bias, layer.lora_A, layer.lora_B)
    got, expected = gradients(layer(x), *inputs), gradients(written_out(layer, x), *inputs)
    for name, a, b in zip("WbAB", got, expected, strict=True):
        assert_close(a, b, f"gradient of {name}")


@both
@with_and_without_start
@pytest.mark.parametrize("tokens", [2, 50])
def test_a_training_step_moves_a_and_b_and_nothing_else(kind, tokens, started):
    layer = make_layer(kind, torch.float32, started=started)
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(torch.randn(tokens, IN)).square().mean().backward()
    optimizer.step()
    for name, now in layer.state_dict().items():
        same = torch.equal(now, before[name])
        assert same == (name not in ("lora_A", "lora_B")), f"{name} {'did not change' if same else 'changed'}"
    assert layer.base_layer.weight.grad is None and layer.base_layer.bias.grad is None


# Start, scaling, dtypes


@both
def test_start_is_the_base_layer_and_only_b_gets_a_gradient(kind):
    torch.manual_seed(0)
    base = nn.Linear(64, 48).requires_grad_(False)
    layer = kind(base, 4, 8)
    x = torch.randn(100, 64)
    for part in (x[:3], x):
        assert_same(layer(part).detach(), base(part), f"{len(part)} tokens at the start")
    layer(x).square().mean().backward()
    assert layer.lora_B.grad.abs().max() > 0
    assert torch.equal(layer.lora_A.grad, torch.zeros(4, 64)), "A's gradient passes through B, which is zero"
    bound = 1 / math.sqrt(64)
    assert 0.9 * bound < layer.lora_A.abs().max() <= bound, "A is uniform within 1/sqrt(in)"


@pytest.mark.parametrize("rslora, scaling", [(False, 16 / 4), (True, 16 / 2)])
def test_scaling(rslora, scaling):
    layer = LoRALinear(nn.Linear(IN, OUT), 4, 16, use_rslora=rslora)
    nn.init.ones_(layer.lora_A)
    nn.init.ones_(layer.lora_B)
    assert layer.scaling == lora_scaling(4, 16, rslora) == scaling, f"the layer scales by {layer.scaling}"
    assert torch.equal(layer.delta_weight(), torch.full((OUT, IN), 4 * scaling))


def test_scaling_by_default_is_alpha_over_r():
    assert lora_scaling(4, 16) == 4 and LoRAConfig(4, 16).use_rslora is False


@with_and_without_start
@pytest.mark.parametrize("tokens", [2, 50])
def test_half_precision_base_keeps_float32_adapters_and_its_output_dtype(tokens, started):
    layer = make_layer(dtype=torch.bfloat16, started=started)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x = torch.randn(tokens, IN, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("tokens", [2, 50])
def test_adapters_narrower_than_the_base_work_in_its_dtype(tokens):
    layer = make_layer(dtype=torch.float32)
    layer.base_layer.double()
    x = torch.randn(tokens, IN, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.lora_A, layer.lora_B)
    got = gradients(layer(x), *inputs)
    assert [gradient.dtype for gradient in got] == [torch.float64, torch.float32, torch.float32]
    layer.double()
    inputs = (x, layer.lora_A, layer.lora_B)
    for name, a, b in zip("xAB", got, gradients(written_out(layer, x), *inputs), strict=True):
        assert_close(a, b.to(a.dtype), f"gradient of {name}")


@both
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_half_precision_does_not_round_a_small_update_away(kind, adapter_dtype):
    layer = make_layer(kind, torch.bfloat16).to(adapter_dtype)
    layer.base_layer.bfloat16()
    nn.init.ones_(layer.base_layer.weight)
    nn.init.constant_(layer.lora_A, 1e-3)
    nn.init.constant_(layer.lora_B, 1.0)  # ΔW = 0.003 everywhere: under half a step of bfloat16 at 1, which is 0.0039
    with torch.no_grad():
        x = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0], dtype=torch.bfloat16).expand(50, IN)  # sums to 1
        layer.base_layer.bias.fill_(-1.0)  # cancels W x
        update = layer(x).float()
    torch.testing.assert_close(update, torch.full_like(update, 0.003), rtol=0.02, atol=0)


@pytest.mark.parametrize("tokens", [2, 50])
def test_autocast_multiplies_in_bfloat16_and_returns_float32_gradients(tokens):
    layer = make_layer(dtype=torch.float32)
    x = torch.randn(tokens, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    inputs = (x, layer.lora_A, layer.lora_B)
    for name, a, b in zip("xAB", gradients(y, *inputs), gradients(layer(x), *inputs), strict=True):
        assert a.dtype == torch.float32
        error = ((a - b).norm() / b.norm()).item()
        assert error < 0.03, f"gradient of {name} is off by {error:.3f} of its norm"


@both
@pytest.mark.parametrize("tokens", [2, 50])
def test_runs_on_meta_and_fake_tensors(kind, tokens):
    with torch.device("meta"):
        base = nn.Linear(IN, OUT).requires_grad_(False)
    layer = kind(base, R, 4)
    assert layer.lora_A.is_meta and layer.lora_B.is_meta
    assert layer(torch.empty(tokens, IN, device="meta")).shape == (tokens, OUT)
    with FakeTensorMode():
        layer = kind(nn.Linear(IN, OUT).requires_grad_(False), R, 4, lora_dropout=0.1)
        for mode in (True, False):
            layer.train(mode)(torch.randn(tokens, IN)).sum().backward()
        assert layer.lora_A.grad.shape == (R, IN) and layer.lora_B.grad.shape == (OUT, R)


@both
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_in_the_mode_of_the_layer_it_wraps(kind, training):
    assert kind(nn.Linear(IN, OUT).train(training), R, 4, 0.5).training == training


# Merging and disabling


@both
@with_and_without_start
@pytest.mark.parametrize("leading", [FEW, MANY], ids=str)
def test_merge_is_the_same_function_and_unmerge_restores_the_bits(kind, leading, started):
    layer = make_layer(kind, started=started)
    original, delta = layer.base_layer.weight.clone(), delta_of(layer).detach()
    x = torch.randn(*leading, IN, dtype=torch.float64)
    unmerged = layer(x)
    layer.merge()
    assert layer.merged
    assert_close(layer(x), unmerged, "merged output")
    assert_close(layer.base_layer.weight.detach(), original + delta, "merged weight")
    assert_close(layer.delta_weight(), delta, "ΔW while merged")
    once = layer.base_layer.weight.clone()
    layer.merge()
    assert_same(layer.base_layer.weight.detach(), once, "W after merging twice, which must add once")
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    assert_same(layer.base_layer.weight.detach(), original, "W after unmerging")
    assert_same(layer(x), unmerged, "output after unmerging")


@with_and_without_start
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_merge_is_rounded_once_and_unmerged_exactly(dtype, started):
    layer = make_layer(dtype=dtype, started=started, in_features=50, out_features=40)
    original = layer.base_layer.weight.clone()
    A, B = (factor.double() for factor in layer.factors())
    exact = original.double() + layer.scaling * B @ A
    layer.merge()
    merged = layer.base_layer.weight
    assert merged.dtype == dtype
    half_step = exact.abs() * torch.finfo(dtype).eps / 2  # rounding to the nearest errs by this much at most
    excess = ((merged.double() - exact).abs() - half_step).max().item()
    assert excess < 1e-5, f"off by {excess:.2e} more than one rounding"
    layer.unmerge()
    assert_same(layer.base_layer.weight.detach(), original, "W after unmerging")


@both
@with_and_without_start
@pytest.mark.parametrize("leading", [FEW, MANY], ids=str)
@pytest.mark.parametrize("merged", [True, False])
def test_disabled_is_the_base_layer_merged_or_not(kind, merged, leading, started):
    layer = make_layer(kind, started=started)
    x = torch.randn(*leading, IN, dtype=torch.float64)
    expected = layer.base_layer(x).clone()
    if merged:
        layer.merge()
    layer.enabled = False
    assert_same(layer(x), expected, "disabled")
    layer.enabled = True
    assert_close(layer(x), expected + x @ delta_of(layer).T, "enabled again")


@with_and_without_start
def test_a_merged_layer_can_be_copied_saved_and_moved(started):
    layer = make_layer(started=started)
    original = layer.base_layer.weight.clone()
    names = {"lora_A", "lora_B", "base_layer.weight", "base_layer.bias"} | (
        {"start_A", "start_B"} if started else set()
    )
    assert set(layer.state_dict()) == names
    layer.merge()
    assert set(layer.state_dict()) == names, "W is kept aside for unmerging only and not saved"
    twin = copy.deepcopy(layer)
    twin.unmerge()
    assert_same(twin.base_layer.weight.detach(), original, "W of a copy, unmerged")
    assert layer.merged, "the copy was unmerged, not the layer"
    moved = layer.to("meta")
    buffers = dict(moved.named_buffers())
    assert set(buffers) == {"original_weight"} | ({"start_A", "start_B"} if started else set())
    assert all(buffer.is_meta for buffer in buffers.values()), "every buffer moves with the layer"
    assert "r=2" in repr(layer) and "scaling=1.5" in repr(layer)


# Bad input


@pytest.mark.parametrize(
    "options, field",
    [
        (dict(r=0), "r is 0"),
        (dict(r=-1), "r is -1"),
        (dict(r=2.5), "r is 2.5"),
        (dict(r=True), "r is True"),
        (dict(lora_alpha=0), "lora_alpha is 0"),
        (dict(lora_alpha=math.nan), "lora_alpha is nan"),
        (dict(lora_alpha=math.inf), "lora_alpha is inf"),
        (dict(lora_alpha="8"), "lora_alpha is '8'"),
        (dict(lora_dropout=1.0), "lora_dropout is 1.0"),
        (dict(lora_dropout=-0.1), "lora_dropout is -0.1"),
    ],
    ids=str,
)
def test_hyperparameters_out_of_range_are_refused_by_name(options, field):
    with pytest.raises(ValueError, match=field):
        LoRAConfig(**options)
    with pytest.raises(ValueError, match=field):
        LoRALinear(nn.Linear(IN, OUT), **{"r": 2, "lora_alpha": 4, **options})


def test_patterns_out_of_range_are_refused_by_key():
    with pytest.raises(ValueError, match=r"rank_pattern\['q_proj'\] is 0"):
        LoRAConfig(rank_pattern={"q_proj": 0})
    with pytest.raises(ValueError, match=r"alpha_pattern\['v_proj'\] is -1"):
        LoRAConfig(alpha_pattern={"v_proj": -1})


def test_a_config_takes_every_start_and_lists_its_targets():
    for start in STARTS:
        assert LoRAConfig(init_lora_weights=start).init_lora_weights == start
    assert LoRAConfig(target_modules=("a", "b")).target_modules == ["a", "b"]
    assert LoRAConfig(target_modules="all-linear").target_modules == "all-linear"
    assert LoRAConfig(r=1, lora_alpha=0.1, lora_dropout=0), "the ends of what is allowed"
