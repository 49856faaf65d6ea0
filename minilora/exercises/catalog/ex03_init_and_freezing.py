"""Exercise 03: how A and B start, and what is frozen."""

import torch
from torch import nn

from minilora.adapters.dora import DoRALinear
from minilora.adapters.inject import train_adapter_only
from minilora.exercises.checking import SIZES, Draw, Exercise, expect, expect_error, require
from minilora.exercises.layers import assemble, written_out
from minilora.linear4bit import Linear4bit
from minilora.lora import LoRALinear

EXERCISE = Exercise(
    number=3,
    slug="init_and_freezing",
    title="Start at the base, train A and B alone",
    targets=("lora:LoRALinear.__init__", "adapters.inject:train_adapter_only"),
    difficulty=2,
    minutes=35,
    notebook="01_lora_from_scratch",
    section="4. Why B starts at zero, and not A",
    explanation="""\
With g = dL/dy, the gradient of B is s·g (A x)ᵀ and that of A is s·Bᵀ g xᵀ. LoRA (Hu et al. 2021) starts with B zero, so
the layer starts as its base, and A random, so B learns at once. With both zero, nothing ever would.

`LoRALinear.__init__` sets:

- `base_layer` (the very object), `in_features`, `out_features`, `r`, `lora_alpha`, `lora_dropout`, `enabled` (True),
  and `scaling`: lora_alpha / r, with use_rslora lora_alpha / √r. Write that out; `lora_scaling` is exercise 07.
- the parameters `lora_A` (r, in), uniform within ±1/√in, and `lora_B` (out, r), zeros. They are float32, float64 on a
  float64 base, on the base's device. A base in 4 bits (`Linear4bit`) has buffers and no `weight`.
- three buffers that are None: `original_weight` (persistent=False), `start_A` and `start_B`.
- training mode: the base's.

Before that, `check_hyperparameters(r, lora_alpha, lora_dropout)` refuses bad values with a ValueError. Whether the base
is frozen is left to the second function.

`train_adapter_only(model)` sets `requires_grad` of every parameter, both ways, whatever it was: on for what
`adapter_parameters(model)` lists (A, B, DoRA's magnitude), off for weights, biases, embeddings and norms. It changes
no value, and returns the model. Go by the modules and not by names: a layer may be called "flora".""",
    hints=(
        "super().__init__() comes first. nn.Parameter(torch.zeros(...)) makes a parameter; self.register_buffer(name, "
        "None) makes an empty buffer; self.train(mode) sets the mode.",
        "nn.init.kaiming_uniform_(weight, a=math.sqrt(5)) draws within ±1/sqrt(weight.shape[1]). So A has to lie as "
        "(r, in), as any nn.Linear's weight does. For device and dtype look at the first of the base's parameters and "
        "buffers; torch.promote_types(dtype, torch.float32) is float64 for float64, and float32 for everything else.",
        "train_adapter_only: model.requires_grad_(False) switches everything off; then parameter.requires_grad_(True) "
        "for each parameter in adapter_parameters(model). Leaving the rest of the optimizer out would not do: its "
        "gradients would still be computed and kept.",
    ),
    question="After the first step of an optimizer, is A still what it was at the start? And after the second?",
    answer="After the first step A is what it was, up to weight decay: its gradient is s·Bᵀ g xᵀ, and B was zero. B "
    "has moved, since its own gradient s·g (A x)ᵀ is not zero. So at the second step A has a gradient as well, and "
    "moves. (Adam moves a parameter whose gradient is exactly zero by 0 / ε, which is zero too.)",
    spoilers=(
        "self.base_layer = base_layer.requires_grad_(False)",
        "self.lora_A = nn.Parameter(torch.empty(r, W.shape[1]",
        "self.lora_B = nn.Parameter(torch.zeros(W.shape[0], r",
        "nn.init.kaiming_uniform_(self.lora_A",
        "self.scaling = alpha / r",
    ),
)


def linear(draw: Draw, most: int, **options) -> nn.Linear:
    """A base layer, neither square nor narrow."""
    d = draw.integer(3, most + 1)
    return nn.Linear(d, d + draw.integer(1, most), **options)


@EXERCISE.property("the layer keeps its base and its settings, and A is (r, in), B (out, r)")
def parts(draw: Draw):
    for most in SIZES:
        base, r = linear(draw, most), 2
        d, out, alpha = base.in_features, base.out_features, draw.integer(5, 20)
        layer, case = LoRALinear(base, r, alpha, 0.25), {"base_layer": base, "r": r, "lora_alpha": alpha}
        require(layer.base_layer is base, "base_layer should be the layer that was given, no copy of it", case)
        for name, value in {"in_features": d, "out_features": out, "r": r, "lora_alpha": alpha}.items():
            expect(getattr(layer, name), value, case, what=name)
        expect(layer.lora_dropout, 0.25, {"lora_dropout": 0.25}, what="lora_dropout")
        require(layer.enabled is True, "enabled should be True", case)
        shapes = {"lora_A": (r, d), "lora_B": (out, r)}
        slips = {
            "A and B have changed places: A takes in numbers to r, B takes r to out": {k: shapes[k] for k in shapes}
            | {"lora_A": (out, r), "lora_B": (r, d)},
            "both lie on their side: rows are outputs, as in nn.Linear's weight": {
                k: v[::-1] for k, v in shapes.items()
            },
            "A lies on its side: (r, in), as nn.Linear's weight": shapes | {"lora_A": (d, r)},
            "B lies on its side: (out, r), as nn.Linear's weight": shapes | {"lora_B": (r, out)},
            "A and B have each other's features: A has in, B has out": {"lora_A": (r, out), "lora_B": (d, r)},
            "A and B are the parameters lora_A and lora_B; you have others, or none": {},
        }
        found = {name: tuple(p.shape) for name, p in layer.named_parameters(recurse=False)}
        expect(found, shapes, case, slips, "the layer's own parameters")


def number(x: float) -> torch.Tensor:
    """As a tensor, numbers are compared relatively and printed short."""
    return torch.tensor(float(x), dtype=torch.float64)


@EXERCISE.property("scaling is lora_alpha / r, and lora_alpha / √r with use_rslora")
def scaling(draw: Draw):
    for r in (2, 4, 9):
        base, alpha = linear(draw, 4), draw.integer(10, 20)
        slips = {
            "lora_alpha is not divided: s = lora_alpha / r": number(alpha),
            "upside down: s = lora_alpha / r": number(r / alpha),
            "whole numbers are divided with //; the scaling is a fraction": number(alpha // r),
            "the square root of r is for use_rslora": number(alpha / r**0.5),
        }
        case = {"r": r, "lora_alpha": alpha}
        expect(number(LoRALinear(base, r, alpha).scaling), number(alpha / r), case, slips, "scaling")
        slips = {"use_rslora changes nothing: it divides by the square root of r": number(alpha / r)}
        found = LoRALinear(base, r, alpha, 0.0, True).scaling
        expect(number(found), number(alpha / r**0.5), case | {"use_rslora": True}, slips, "scaling")


def drawn(base: nn.Module, r: int) -> tuple[LoRALinear, dict]:
    """A new layer and a case for the reports. Wrong unless its A and B are parameters of the right shapes."""
    layer, case = LoRALinear(base, r, 16), {"in": base.in_features, "out": base.out_features, "r": r}
    for name, shape in {"lora_A": (r, base.in_features), "lora_B": (base.out_features, r)}.items():
        p = getattr(layer, name)
        require(isinstance(p, nn.Parameter), f"{name} is no nn.Parameter", case)
        require(p.shape == shape, f"expected {name} of shape {shape}, got {tuple(p.shape)}", case)
    return layer, case


@EXERCISE.property("at the start B gets a gradient and A none: B is zero, A is not")
def start(draw: Draw):
    for most in SIZES:
        base = linear(draw, most, dtype=torch.float64)
        layer, case = drawn(base, draw.integer(1, 3))
        A, B = layer.lora_A, layer.lora_B
        a, b = A.detach().any().item(), B.detach().any().item()
        reasons = {
            (False, False): "both are zero: neither ever gets a gradient, and nothing is learnt",
            (False, True): "A is zero and B random; it is the other way round",
            (True, True): "both are random: the layer does not start as its base; B is zero",
        }
        require(a and not b, "expected random numbers in A, zeros in B", case, reasons.get((a, b), ""))
        slip = "draw each number of A by itself: rows that are alike stay alike in training"
        require(2 * A.unique().numel() > A.numel(), "expected A to be random; its numbers are alike", case, slip)
        again = LoRALinear(base, layer.r, 16).lora_A
        require(not torch.equal(A, again), "two layers start with the same A", case, "do not seed the generator here")
        x, weights = draw.normal(9, layer.in_features), draw.normal(9, layer.out_features)
        y = written_out(x, *base.parameters(), A, B, layer.scaling)
        gA, gB = torch.autograd.grad((y * weights).sum(), (A, B))
        require(not gA.any() and bool(gB.any()), "A should get no gradient at the start, and B some", case)


@EXERCISE.property("A is uniform within ±1/√in")
def spread(draw: Draw):
    for d, r in ((100, 300), (draw.integer(500, 900), 40)):
        layer, case = drawn(nn.Linear(d, 4), r)
        A, bound = layer.lora_A.detach().double(), d**-0.5
        sigmas = {
            "the bound is 1/sqrt(r): A lies as (in, r) when it is drawn, or the wrong dimension counts": (3 * r)
            ** -0.5,
            "kaiming_uniform_ without a=math.sqrt(5) is sqrt(6) times too wide": bound * 2**0.5,
            "the spread is 1/sqrt(in) itself; the bound should be, and the spread 1/sqrt(3·in)": bound,
            "the numbers are as large as 1, whatever in is": 1,
            "that is uniform from 0 to 1, or within ±1/2": 12**-0.5,
            "that is uniform from 0 to the bound, without negative numbers": bound * 12**-0.5,
            "the spread is 1/r, PEFT's 'gaussian'": 1 / r,
            "that is Xavier's bound, sqrt(6/(in + r))": (2 / (d + r)) ** 0.5,
        }
        slips = {sentence: number(sigma) for sentence, sigma in sigmas.items()}
        what = "the standard deviation of A"
        expect(A.std(), number((3 * d) ** -0.5), case, slips, what, tolerance=0.03)  # ten standard errors
        require(abs(A.mean().item()) < bound / 10, f"expected a mean of about 0, got {A.mean().item():.2g}", case)
        slip = "the numbers are normal; a uniform distribution ends at its bound"
        largest = A.abs().max().item()
        require(largest <= bound * (1 + 1e-6), f"expected no number beyond {bound:.4g}, got {largest:.4g}", case, slip)


@EXERCISE.property("A and B are float32 or wider, on the base's device, also beside 4 bits")
def kinds(draw: Draw):
    wanted = {torch.float32: torch.float32, torch.float64: torch.float64}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        layer, case = LoRALinear(linear(draw, 4, dtype=dtype), 2, 16), {"base's dtype": str(dtype)}
        slip = "in half precision the small steps of training round away; A and B are float32 there"
        slip = slip if dtype.itemsize == 2 else "take the wider of the base's dtype and float32"
        for name in ("lora_A", "lora_B"):
            found = getattr(layer, name).dtype
            right = wanted.get(dtype, torch.float32)
            require(found is right, f"{name}: expected {right}, got {found}", case, slip)
    for bias in (True, False):
        try:
            layer = LoRALinear(Linear4bit(3, 5, bias), 2, 16)
        except AttributeError as error:
            slip = "a layer in 4 bits has no weight: look at any of its parameters and buffers"
            require(False, str(error), {"base_layer": "Linear4bit", "bias": bias}, slip)
        found = [layer.lora_A.dtype, layer.lora_B.dtype]
        slip = "codes are bytes: take the wider of the stored dtype and float32"
        require(found == [torch.float32] * 2, f"expected float32, got {found}", {"base_layer": "Linear4bit"}, slip)
    layer = LoRALinear(linear(draw, 4, device="meta"), 2, 16)
    for name in ("lora_A", "lora_B"):
        slip = "make it on the device of what the base stores"
        found = str(getattr(layer, name).device)
        require(found == "meta", f"{name} is on {found}", {"base's device": "meta"}, slip)


@EXERCISE.property("a new layer is not merged, is in its base's mode, and has room for what merging keeps")
def state(draw: Draw):
    for training in (True, False):
        base = linear(draw, 4).train(training)
        layer, case = LoRALinear(base, 2, 16, 0.5), {"base_layer.training": training}
        slip = "put into a model in eval mode, it would drop something; take the base's mode"
        require(layer.training is training, f"training is {layer.training}", case, slip)
        require(base.training is training, "the base has changed its mode", case)
        weight = base.weight.detach()
        for name in ("original_weight", "start_A", "start_B"):
            require(getattr(layer, name) is None, f"{name} should be None", case)
            slip = "register_buffer(name, None); what is assigned to a plain attribute does not move with the module"
            setattr(layer, name, weight.clone())
            require(name in dict(layer.named_buffers()), f"{name} is no buffer", case, slip)
        saved = sorted(name for name in layer.state_dict() if not name.startswith("base_layer."))
        wanted = ["lora_A", "lora_B", "start_A", "start_B"]
        slip = {
            "the W from before merging is saved as well; its buffer is not persistent": [
                *wanted[:2],
                "original_weight",
                *wanted[2:],
            ]
        }
        expect(saved, wanted, case, slip, "what a state_dict holds once the buffers are filled")


@EXERCISE.property("values that cannot work are refused with a ValueError that names them")
def refused(draw: Draw):
    base = linear(draw, 4)
    slip = "call check_hyperparameters(r, lora_alpha, lora_dropout)"
    for name, bad in (("lora_alpha", 0), ("lora_dropout", 1.0), ("r", -draw.integer(1, 9)), ("r", 0)):
        options = {"r": 2, "lora_alpha": 16, "lora_dropout": 0.0} | {name: bad}
        expect_error(lambda options=options: LoRALinear(base, **options), (name,), {name: bad}, slip)


def adapted(draw: Draw, most: int, kind: type) -> nn.ModuleDict:
    """A model with every kind of parameter, a LoRA layer among them."""
    d, h = draw.integer(1, most), draw.integer(1, most)
    lora = assemble(draw, nn.Linear(d, h).double(), draw.integer(1, 2), 1, 0.0, kind)
    if kind is DoRALinear:
        lora.lora_magnitude_vector = nn.Parameter(draw.normal(h))
    net = {"embed": nn.Embedding(3, d), "norm": nn.LayerNorm(d), "up": lora, "flora": nn.Linear(h, d)}
    return nn.ModuleDict(net).double()


@EXERCISE.property("train_adapter_only: on for the adapter, off for all else, whatever it was before")
def both_ways(draw: Draw):
    for kind, most in zip((LoRALinear, DoRALinear, LoRALinear), SIZES, strict=True):
        for before in ("on", "mixed", "off"):
            net = adapted(draw, most, kind)
            odd = draw.integer(0, 1)  # mixed: every other one, so of A and B one
            flags = {
                name: before == "on" or before == "mixed" and number % 2 == odd
                for number, name in enumerate(net.state_dict())
            }
            for name, parameter in net.named_parameters():
                parameter.requires_grad_(flags[name])
            values = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            names, case = [*values], {"model": kind.__name__, "requires_grad before": before}
            right = [n for n in names if n.startswith("up.lora_")]
            returned = train_adapter_only(net)

            def those(*ends, names=names):
                return [n for n in names if n.startswith(ends)]

            slips = {
                "nothing is frozen": names,
                "requires_grad stays as it was": [n for n in names if flags[n]],
                "the base weights inside the LoRA layers are left trainable": those("up."),
                "a layer whose name has 'lora' in it is no adapter; go by the modules": [
                    n for n in names if "lora" in n
                ],
                "the norm is left trainable": those("norm") + right,
                "the embedding is left trainable": those("embed") + right,
                "the embedding and the norm are left trainable": those("embed", "norm") + right,
                "only the bases are frozen, not the rest of the model": [n for n in names if ".base_layer." not in n],
                "only weights are frozen; biases have to be as well": [n for n in names if n in right or "bias" in n],
                "DoRA's magnitude belongs to the adapter": those("up.lora_A", "up.lora_B"),
                "the adapter is frozen as well": [],
                "what was frozen before is not switched on": [n for n in right if flags[n]],
                "A alone is trained": those("up.lora_A"),
                "B alone is trained": those("up.lora_B"),
            }
            found = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
            expect(found, right, case, slips, "trainable")
            require(returned is net, "expected the model back, the same object", case, "return the model")
            same = all(torch.equal(values[name], tensor) for name, tensor in net.state_dict().items())
            require(same, "values have changed; only requires_grad should", case)


@EXERCISE.property("train_adapter_only: after it a backward pass leaves gradients on A and B alone")
def gradients(draw: Draw):
    for most in SIZES:
        layer = adapted(draw, most, LoRALinear)["up"].requires_grad_(True)  # the model may be a LoRA layer itself
        train_adapter_only(layer)
        base, x, weights = layer.base_layer, draw.normal(5, layer.in_features), draw.normal(5, layer.out_features)
        y = written_out(x, base.weight, base.bias, layer.lora_A, layer.lora_B, layer.scaling)
        case = {"model": "one LoRALinear", "in": layer.in_features, "out": layer.out_features}
        require(y.requires_grad, "nothing is left to train", case, "the model may be a LoRA layer itself")
        (y * weights).sum().backward()
        having = [name for name, parameter in layer.named_parameters() if parameter.grad is not None]
        slip = {"the base is not frozen: its gradients are computed and kept": [*dict(layer.named_parameters())]}
        expect(having, ["lora_A", "lora_B"], case, slip, "parameters with a gradient")
