"""One LoRA layer against its formula.

A and B are random, and in float64 where numbers are compared: a B of zeros hides a missing scale or a wrong merge.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from minilora.lora import FormedWeight, LoRAConfig, LoRALinear, LowRankTerm, lora_reference

IN, OUT, R = 6, 5, 2
FEW, MANY = (2,), (3, 7)  # leading dimensions with fewer and more tokens than 2·in·out / (in + out) = 5.5


def make_layer(dtype=torch.float64, r=R, dropout=0.0, bias=True, in_features=IN, out_features=OUT, **options):
    """A frozen nn.Linear in a LoRALinear with random A and B."""
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features, bias=bias, dtype=dtype).requires_grad_(False)
    layer = LoRALinear(base, r, 3.0, dropout, **options)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    return layer


def reference(layer, x):
    base = layer.base_layer
    return lora_reference(x, base.weight, base.bias, layer.lora_A, layer.lora_B, layer.scaling)


def gradients(output, *inputs):
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)  # differs for every element
    return torch.autograd.grad((output * weights).sum(), inputs)


def assert_close(got, expected, what):
    torch.testing.assert_close(got, expected, msg=lambda message: f"{what}: {message}")


class OtherLinear(nn.Module):
    """A base that is not an nn.Linear and holds its weight in a buffer, as a quantized layer does."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", linear.weight.detach().clone())
        self.register_buffer("shift", linear.bias.detach().clone())

    def forward(self, x):
        return F.linear(x, self.codes, self.shift)


# The two forms


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_gradcheck_formed_weight(bias, needs_input_gradient):
    layer = make_layer(bias=bias)
    x = torch.randn(3, 4, IN, dtype=torch.float64, requires_grad=needs_input_gradient)
    base = layer.base_layer
    assert torch.autograd.gradcheck(
        lambda x, A, B: FormedWeight.apply(x, base.weight, base.bias, A, B, 1.5), (x, layer.lora_A, layer.lora_B)
    )


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_gradcheck_low_rank_term(masked, needs_input_gradient):
    layer = make_layer()
    x = torch.randn(3, 4, IN, dtype=torch.float64, requires_grad=needs_input_gradient)
    base = torch.randn(3, 4, OUT, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 4, IN) > 0.3 if masked else None
    assert torch.autograd.gradcheck(
        lambda base, x, A, B: LowRankTerm.apply(base, x, A, B, 1.5, mask), (base, x, layer.lora_A, layer.lora_B)
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), FEW, (2, 1, 2), MANY, (2, 3, 2, 2), (0,)], ids=str)
def test_layer_equals_formula_forward_and_backward(leading, bias):
    layer = make_layer(bias=bias)
    x = torch.randn(*leading, IN, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.lora_A, layer.lora_B)
    got, expected = layer(x), reference(layer, x)
    assert_close(got, expected, "output")
    for name, a, b in zip("xAB", gradients(got, *inputs), gradients(expected, *inputs), strict=True):
        assert_close(a, b, f"gradient of {name}")


def test_layer_takes_inputs_and_gradients_that_are_not_contiguous():
    layer = make_layer()
    x = torch.randn(7, 3, IN, dtype=torch.float64).transpose(0, 1).requires_grad_()
    got, expected = (gradients(y.transpose(0, 1), x, layer.lora_B) for y in (layer(x), reference(layer, x)))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, "gradient")


def test_many_tokens_form_the_weight_and_few_do_not():
    layer = make_layer()
    few, many = (layer(torch.randn(*shape, IN, dtype=torch.float64)) for shape in (FEW, MANY))
    assert type(few.grad_fn).__name__ == "LowRankTermBackward"
    assert type(many.grad_fn).__name__ == "FormedWeightBackward"


@pytest.mark.parametrize("leading", [FEW, MANY], ids=str)
def test_dropout_equals_the_formula_on_the_dropped_input(leading):
    p = 0.4
    layer = make_layer(dropout=p)
    x = torch.randn(*leading, IN, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    got = layer(x)
    torch.manual_seed(1)
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
    assert 0 < mask.sum() < mask.numel()
    dropped = x * mask / (1 - p)
    base = layer.base_layer
    expected = base(x) + layer.scaling * dropped @ layer.lora_A.T @ layer.lora_B.T
    assert_close(got, expected, "output")
    inputs = (x, layer.lora_A, layer.lora_B)
    for name, a, b in zip("xAB", gradients(got, *inputs), gradients(expected, *inputs), strict=True):
        assert_close(a, b, f"gradient of {name}")
    layer.eval()
    assert_close(layer(x), reference(layer, x), "output in eval mode, where nothing is dropped")


@pytest.mark.parametrize("leading", [FEW, MANY], ids=str)
def test_any_base_layer_with_in_and_out_features(leading):
    plain = make_layer()
    layer = LoRALinear(OtherLinear(plain.base_layer), R, 3.0)
    layer.lora_A, layer.lora_B = plain.lora_A, plain.lora_B
    x = torch.randn(*leading, IN, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.lora_A, layer.lora_B)
    for a, b in zip(gradients(layer(x), *inputs), gradients(reference(plain, x), *inputs), strict=True):
        assert_close(a, b, "gradient")
    with pytest.raises(ValueError, match="OtherLinear"):
        layer.merge()


def test_a_base_that_is_not_frozen_gets_its_gradients():
    layer = make_layer()
    layer.base_layer.requires_grad_(True)
    x = torch.randn(*MANY, IN, dtype=torch.float64)
    inputs = (layer.base_layer.weight, layer.base_layer.bias, layer.lora_A, layer.lora_B)
    for a, b in zip(gradients(layer(x), *inputs), gradients(reference(layer, x), *inputs), strict=True):
        assert_close(a, b, "gradient")


# What is kept, what is touched


def saved_storages(layer, x):
    """{address: bytes} of every storage that the forward pass keeps for backward."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return saved


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("tokens", [4, 100])
def test_backward_keeps_no_copy_of_the_weight_nor_of_the_input(tokens, dropout):
    layer = make_layer(torch.float32, dropout=dropout, in_features=40, out_features=30)
    x = torch.randn(tokens, 40, requires_grad=True)
    saved = saved_storages(layer, x)
    for known in (x, *layer.parameters()):
        saved.pop(known.untyped_storage().data_ptr(), None)
    # A x holds r numbers a token, the mask one byte an element; the formed weight keeps neither.
    allowed = tokens * 40 + tokens * R * 4 if dropout else (tokens * R * 4 if tokens == 4 else 0)
    assert sum(saved.values()) == allowed, f"{sum(saved.values())} bytes kept, {allowed} expected"


@pytest.mark.parametrize("tokens", [3, 50])
def test_no_input_gradient_is_computed_where_none_is_asked(tokens):
    layer, products = make_layer(), []
    output = layer(torch.randn(tokens, IN, dtype=torch.float64))

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mm.default:
                products.append(tuple(result.shape))
            return result

    with Count():
        output.sum().backward()
    assert (tokens, IN) not in products, f"products of shapes {products}"


@pytest.mark.parametrize("tokens", [2, 50])
def test_a_training_step_leaves_the_base_as_it_is(tokens):
    layer = make_layer(torch.float32)
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(torch.randn(tokens, IN)).square().mean().backward()
    optimizer.step()
    for name, now in layer.state_dict().items():
        same = torch.equal(now, before[name])
        assert same == name.startswith("base_layer"), f"{name} {'did not change' if same else 'changed'}"
    assert layer.base_layer.weight.grad is None and layer.base_layer.bias.grad is None


# Start, scaling, dtypes


def test_start_is_the_base_layer_and_only_b_gets_a_gradient():
    base = nn.Linear(64, 48).requires_grad_(False)
    layer = LoRALinear(base, 4, 8)
    x = torch.randn(100, 64)
    assert torch.equal(layer(x[:3]), base(x[:3])) and torch.equal(layer(x), base(x))
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
    assert layer.scaling == scaling
    assert torch.equal(layer.delta_weight(), torch.full((OUT, IN), 4 * scaling))


@pytest.mark.parametrize("tokens", [2, 50])
def test_half_precision_base_keeps_float32_adapters_and_its_output_dtype(tokens):
    layer = make_layer(torch.bfloat16)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x = torch.randn(tokens, IN, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("tokens", [2, 50])
def test_adapters_narrower_than_the_base_work_in_its_dtype(tokens):
    layer = make_layer(torch.float32)
    layer.base_layer.double()
    x = torch.randn(tokens, IN, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.lora_A, layer.lora_B)
    got = gradients(layer(x), *inputs)
    assert [gradient.dtype for gradient in got] == [torch.float64, torch.float32, torch.float32]
    layer.double()
    inputs = (x, layer.lora_A, layer.lora_B)
    for a, b in zip(got, gradients(reference(layer, x), *inputs), strict=True):
        assert_close(a, b.to(a.dtype), "gradient")


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_half_precision_does_not_round_a_small_update_away(adapter_dtype):
    layer = make_layer(torch.bfloat16).to(adapter_dtype)
    layer.base_layer.bfloat16()
    nn.init.ones_(layer.base_layer.weight)
    nn.init.constant_(layer.lora_A, 1e-3)
    nn.init.constant_(layer.lora_B, 1.0)  # ΔW = 0.003 everywhere: under half a step of bfloat16 at 1, which is 0.0039
    with torch.no_grad():
        x = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0], dtype=torch.bfloat16).expand(50, IN)  # sums to 1
        layer.base_layer.bias.fill_(-1.0)  # cancels W x
        update = layer(x).float()
    torch.testing.assert_close(update, torch.full_like(update, 0.003), rtol=0.02, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [2, 50])
def test_autocast_multiplies_in_bfloat16_and_returns_float32_gradients(tokens, dropout):
    layer = make_layer(torch.float32, dropout=dropout)
    x = torch.randn(tokens, IN, requires_grad=True)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    inputs = (x, layer.lora_A, layer.lora_B)
    got = gradients(y, *inputs)
    torch.manual_seed(1)
    for name, a, b in zip("xAB", got, gradients(layer(x), *inputs), strict=True):
        assert a.dtype == torch.float32
        error = ((a - b).norm() / b.norm()).item()
        assert error < 0.03, f"gradient of {name} is off by {error:.3f} of its norm"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [2, 50])
def test_checkpointing_gives_the_same_gradients(tokens, dropout):
    layer = make_layer(dropout=dropout)
    x = torch.randn(tokens, IN, dtype=torch.float64, requires_grad=True)
    inputs, results = (x, layer.lora_A, layer.lora_B), []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(1)
        results.append(gradients(run(x), *inputs))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tokens", [2, 50])
def test_runs_on_meta_and_fake_tensors(tokens):
    with torch.device("meta"):
        base = nn.Linear(IN, OUT).requires_grad_(False)
    layer = LoRALinear(base, R, 4)
    assert layer.lora_A.is_meta and layer.lora_B.is_meta
    assert layer(torch.empty(tokens, IN, device="meta")).shape == (tokens, OUT)
    with FakeTensorMode():
        layer = LoRALinear(nn.Linear(IN, OUT).requires_grad_(False), R, 4, lora_dropout=0.1)
        for mode in (True, False):
            layer.train(mode)(torch.randn(tokens, IN)).sum().backward()
        assert layer.lora_A.grad.shape == (R, IN) and layer.lora_B.grad.shape == (OUT, R)


# Merging


@pytest.mark.parametrize("tokens", [2, 50])
def test_merge_is_the_same_function_and_unmerge_restores_the_bits(tokens):
    layer = make_layer()
    original = layer.base_layer.weight.clone()
    x = torch.randn(tokens, IN, dtype=torch.float64)
    unmerged = layer(x)
    layer.merge()
    assert layer.merged
    assert_close(layer(x), unmerged, "merged output")
    assert_close(
        layer.base_layer.weight.detach(), original + layer.scaling * layer.lora_B @ layer.lora_A, "merged weight"
    )
    once = layer.base_layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.base_layer.weight, once), "merging twice must add once"
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.base_layer.weight, original)
    assert torch.equal(layer(x), unmerged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_merge_is_rounded_once_and_unmerged_exactly(dtype):
    layer = make_layer(dtype, in_features=50, out_features=40)
    original = layer.base_layer.weight.clone()
    exact = original.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    layer.merge()
    merged = layer.base_layer.weight
    assert merged.dtype == dtype
    half_step = exact.abs() * torch.finfo(dtype).eps / 2  # rounding to the nearest errs by this much at most
    excess = ((merged.double() - exact).abs() - half_step).max().item()
    assert excess < 1e-5, f"off by {excess:.2e} more than one rounding"
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, original)


@pytest.mark.parametrize("merged", [True, False])
def test_disabled_is_the_base_layer_merged_or_not(merged):
    layer = make_layer()
    x = torch.randn(*MANY, IN, dtype=torch.float64)
    expected = layer.base_layer(x).clone()
    if merged:
        layer.merge()
    layer.enabled = False
    assert torch.equal(layer(x), expected)


def test_a_merged_layer_can_be_copied_saved_and_moved():
    layer = make_layer()
    original = layer.base_layer.weight.clone()
    names = set(layer.state_dict())
    layer.merge()
    assert set(layer.state_dict()) == names == {"lora_A", "lora_B", "base_layer.weight", "base_layer.bias"}
    twin = copy.deepcopy(layer)
    twin.unmerge()
    assert torch.equal(twin.base_layer.weight, original) and layer.merged
    assert layer.to("meta").original_weight.is_meta
    assert "r=2" in repr(layer) and "scaling=1.5" in repr(layer)


# Bad input


@pytest.mark.parametrize(
    "options, field",
    [
        (dict(r=0), "r is 0"),
        (dict(r=-1), "r is -1"),
        (dict(r=2.5), "r is 2.5"),
        (dict(lora_alpha=0), "lora_alpha is 0"),
        (dict(lora_alpha=math.nan), "lora_alpha is nan"),
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
