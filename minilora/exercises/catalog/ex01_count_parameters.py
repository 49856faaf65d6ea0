"""Exercise 01: counting parameters."""

import torch
from torch import nn

from minilora.adapters.inject import count_parameters
from minilora.exercises.checking import SIZES, Draw, Exercise, expect, require
from minilora.exercises.layers import assemble
from minilora.linear4bit import Linear4bit
from minilora.quant import Quantization

EXERCISE = Exercise(
    number=1,
    slug="count_parameters",
    title="Count the parameters",
    targets=("adapters.inject:count_parameters",),
    difficulty=1,
    minutes=15,
    notebook="01_lora_from_scratch",
    section="The arithmetic",
    explanation="""\
Every claim about LoRA begins with two counts: how many numbers are trained, and how many there are. A linear layer
holds W (out, in) and perhaps a bias (out,), so out·in + out numbers. LoRA freezes them and adds A (r, in) and
B (out, r), r·(in + out) numbers, which it trains. The share of the two is often a small fraction of a per cent.

`count_parameters(model)` returns the pair (trainable, all) of whole numbers:

- trainable: the numbers in those parameters that have `requires_grad`; all: the numbers in all of them, frozen or not.
- A parameter that two modules share, such as the matrix of an embedding and of a tied output head, is one parameter
  and counts once.
- Buffers, such as the running mean of a batch norm, are no parameters.
- A `Linear4bit` keeps its frozen weight as codes in buffers, two weights to a byte. It stands for a weight
  (out_features, in_features), and counts as in_features·out_features parameters, none of them trainable. Its bias is
  an ordinary parameter. `quantized_layers(model)` gives these layers by name.

Shapes are all that matters: the function also works on the "meta" device, where a model of 7 billion parameters has
shapes and no numbers. The model stays as it is.""",
    hints=(
        "model.parameters() gives every parameter of the model and of its submodules, each of them once, and no "
        "buffers. tensor.numel() is the number of numbers in a tensor of any shape.",
        "You need two sums over the same parameters: one with `if p.requires_grad`, one without a condition. Then the "
        "second one lacks the weights in 4 bits, which no parameter stands for.",
        "Add layer.in_features * layer.out_features for each layer in quantized_layers(model).values() to the second "
        "sum, and return (first, second).",
    ),
    question="Of Llama-2-7B, LoRA with r = 8 on q_proj and v_proj trains 0.06 %. Why does the memory for training not "
    "fall to 0.06 % as well?",
    answer="Memory for training holds more than what is trained. The frozen weights themselves stay, in full: 13.5 "
    "GB in bfloat16. What shrinks to 0.06 % is what goes with trained parameters, their gradients and Adam's two "
    "moments. Activations that wait for backward do not depend on how many parameters are trained, for the gradient "
    "has to travel through every frozen layer to reach the A and B below it.",
)


def counted(net: nn.Module):
    """The student's pair. Two whole numbers in a tuple, or Wrong."""
    pair = count_parameters(net)
    whole = isinstance(pair, tuple) and [type(number) for number in pair] == [int, int]
    require(whole, f"expected a tuple of two whole numbers, (trainable, all); got {pair!r}")
    return pair


def shapes(net: nn.Module) -> dict:
    return {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}


@EXERCISE.property("the numbers in parameters of any shape, and not the tensors")
def any_shape(draw: Draw):
    for most in SIZES:
        a, b, c = (draw.integer(2, most) for _ in range(3))
        numbers = {(): 1, (a,): a, (a, b): a * b, (a, 0): 0, (a, b, c, 2): 2 * a * b * c}
        tensors = [nn.Parameter(torch.zeros(shape)) for shape in numbers]
        n = sum(numbers.values())
        slips = {
            "that is the number of tensors; count the numbers in each": (5, 5),
            "those are bytes; count the numbers": (4 * n, 4 * n),
            "only matrices are counted; a parameter may have any number of dimensions": (a * b, a * b),
        }
        expect(counted(nn.ParameterList(tensors)), (n, n), {"shapes": [*numbers]}, slips, "(trainable, all)")


@EXERCISE.property("(trainable, all): frozen parameters count for the second number only")
def frozen(draw: Draw):
    for most in SIZES:
        d, out = draw.integer(1, most), draw.integer(2, most)
        net = nn.ModuleDict({"base": nn.Linear(d, out), "A": nn.Linear(d, 1, bias=False)})
        net["base"].requires_grad_(False)
        t, n = d, d + out * d + out
        slips = {
            "frozen parameters are counted as trainable: look at requires_grad": (n, n),
            "the pair is the wrong way round: trainable first, then all": (n, t),
            "the second number is that of the frozen ones; it should be of all, trainable ones included": (t, n - t),
            "the first number is that of the frozen ones": (n - t, n),
            "frozen parameters are left out of the second number": (t, t),
        }
        case = {**shapes(net), "frozen": "base"}
        expect(counted(net), (t, n), case, slips, "(trainable, all)")
        flags = [parameter.requires_grad for parameter in net.parameters()]
        require(flags == [False, False, True], "counting has changed requires_grad; leave the model as it is", case)


@EXERCISE.property("a parameter that two modules share counts once, two equal ones twice")
def shared(draw: Draw):
    for most in SIZES:
        v, d = draw.integer(2, most), draw.integer(1, most)
        net = nn.ModuleDict({"embed": nn.Embedding(v, d), "norm": nn.LayerNorm(d), "head": nn.Linear(d, v, bias=False)})
        net["head"].weight = net["embed"].weight
        net["norm"].requires_grad_(False)
        twice = "the shared weight is counted twice: what embed and head hold is one parameter"
        expect(
            counted(net),
            (v * d, v * d + 2 * d),
            {"embed.weight": (v, d), "head.weight": "that of embed", "norm": f"2 of {(d,)}, frozen"},
            {twice: (2 * v * d, 2 * v * d + 2 * d), "the shared weight is not counted": (0, 2 * d)},
            "(trainable, all)",
        )
        layer = nn.Linear(d, v)
        twice = "a layer that is used under two names is counted twice"
        case = {"first, second": f"the same {layer}"}
        n = v * d + v
        expect(counted(nn.ModuleDict({"first": layer, "second": layer})), (n, n), case, {twice: (2 * n, 2 * n)})
        alike = nn.ParameterList([nn.Parameter(torch.ones(v, d)) for _ in range(2)])
        once = "two parameters that happen to hold the same numbers are counted once; only the same object is shared"
        case = {"shapes": [(v, d)] * 2, "values": "all 1"}
        expect(counted(alike), (2 * v * d, 2 * v * d), case, {once: (v * d, v * d)}, "(trainable, all)")


@EXERCISE.property("buffers are no parameters")
def buffers(draw: Draw):
    for most in SIZES:
        d, out = draw.integer(1, most), draw.integer(1, most)
        net = nn.Sequential(nn.Linear(d, out), nn.BatchNorm1d(out))
        t, n = 2 * out, d * out + 3 * out
        net[0].requires_grad_(False)
        slips = {
            "the buffers are counted: the batch norm's running mean, variance and count": (t, n + 2 * out + 1),
            "the running mean and variance are counted; they are buffers": (t, n + 2 * out),
        }
        case = {"model": f"Linear({d}, {out}), BatchNorm1d({out})", "frozen": "the first"}
        expect(counted(net), (t, n), case, slips, "(trainable, all)")


@EXERCISE.property("a weight in 4 bits counts as in·out frozen parameters")
def four_bits(draw: Draw):
    for most in SIZES:
        out, more = (draw.integer(1, most // 2) for _ in range(2))
        out, d = 2 * out + 1, 2 * more + 3  # both odd: the last byte holds one code
        quantization = Quantization(block_size=16, double_quant=draw.choice([False, True]))
        layer = Linear4bit(d, out, True, quantization)
        n, stored = d * out, sum(tensor.numel() for tensor in layer.buffers())
        slips = {
            "the weight in 4 bits is not counted: it is in buffers, not in parameters": (out, out),
            "the codes are counted, two weights to a byte; a weight is one parameter": (out, out + (n + 1) // 2),
            "twice the codes is one too many for an odd number of weights: count in·out": (out, out + n + 1),
            "the buffers of the layer are counted; what counts is the weight they stand for": (out, out + stored),
            "the weight in 4 bits is counted as trainable; it is frozen": (out + n, out + n),
            "the bias of the layer is not counted": (0, n),
        }
        case = {"in": d, "out": out, "bias": "trainable"}
        expect(counted(nn.Sequential(nn.Tanh(), layer)), (out, out + n), case, slips, "(trainable, all)")

        r = draw.integer(1, 2)  # QLoRA: the same with A and B around it, and everything else frozen
        net = nn.ModuleDict({"block": nn.ModuleList([assemble(draw, Linear4bit(d, out, False, quantization), r, 1)])})
        t = r * (d + out)
        slips = {
            "the weight in 4 bits of a layer further down is not counted": (t, t),
            "the layer in 4 bits and the LoRALinear around it are both counted": (t, t + 2 * n),
        }
        case = {"in": d, "out": out, "base_layer": "4 bits, without bias", "r": r}
        expect(counted(net), (t, t + n), case, slips, "(trainable, all)")


@EXERCISE.property("on the meta device, where a large model has shapes and no numbers")
def meta(draw: Draw):
    for width in (64, 4096):
        out, r = width * draw.integer(2, 4), draw.choice([8, 16])
        with torch.device("meta"):
            base = nn.Linear(width, out, bias=False).requires_grad_(False)
            net = nn.ModuleDict({"base": base, "A": nn.Linear(width, r, False), "B": nn.Linear(r, out, False)})
        t, n = r * (width + out), width * out
        first = "each tensor on meta has data_ptr() 0, and they pass for one: tell parameters apart by object"
        expect(counted(net), (t, t + n), shapes(net), {first: (0, n)}, "(trainable, all)")
