"""Exercise 09: the bytes of a training step, by formula."""

from dataclasses import replace

import torch
from torch import nn

from minilora.exercises.checking import SIZES, Draw, Exercise, expect, require
from minilora.exercises.layers import assemble
from minilora.experiments.simulate import bytes_in_4_bits, count_base_parameters, predict
from minilora.linear4bit import Linear4bit, float_linears, replace_module
from minilora.model import GPT, GPTConfig
from minilora.quant import Quantization

EXERCISE = Exercise(
    number=9,
    slug="bytes",
    title="Every byte of a training step, before it runs",
    targets=(
        "experiments.simulate:count_base_parameters",
        "experiments.simulate:predict",
        "experiments.simulate:bytes_in_4_bits",
    ),
    difficulty=2,
    minutes=40,
    notebook="02_full_vs_lora",
    section="2. Memory",
    explanation="""\
Three of the four kinds of memory in training follow from shapes alone: weights, gradients, optimizer state.

`count_base_parameters(config)`: how many numbers GPT(config) holds, from its fields only. A layer has q (H·D, C), k and
v (K·D, C), o (C, H·D), gate and up (inner, C), down (C, inner) and two norms (C,); biases where the config asks for
them, one number for each output. Besides: a last norm, the embedding (V, C), and the output head (V, C) unless it is
tied to the embedding, when both are one matrix.

`bytes_in_4_bits(layer)`: the codes of n = in·out weights, half a byte each, and a float32 scale for each of N blocks
of `layer.quantization.block_size`. With double quantization (`layer.quantization.double_quant`) a scale is one byte,
each 256 of them share a float32, and one more float32 is their offset. What is short still takes its byte, its scale:
round up. The bias is not in 4 bits and not counted here.

`predict(model, dtype)`: {"weights", "gradients", "optimizer"} in bytes. Without adapters all is trained, in `dtype`.
With adapters the base is frozen, in `dtype` except for the weights that are in 4 bits, and A (r, in) and B (out, r)
are float32 whatever `dtype` is. Gradients: one number for each that is trained. AdamW (Loshchilov and Hutter 2019): two
averages, in the dtype of the weight, and a step count of 4 bytes for each trained tensor. All results are whole numbers
(int).""",
    hints=(
        "Write the list of all matrices of one layer with their shapes, once, on paper. `dtype.itemsize` is the bytes "
        "of one number; `lora_layers(model)` and `quantized_layers(model)` find the layers.",
        "math.ceil(n / size) counts blocks. In predict, take in·out of every 4-bit layer off the base's count, and "
        "add bytes_in_4_bits for it.",
        "a = sum of r·(in + out) over the adapters. weights = itemsize·(base - in_4_bits) + stored + 4·a; gradients = "
        "4·a, or itemsize·base without adapters; optimizer = 2·gradients + 4·(number of tensors with requires_grad).",
    ),
    question="Why is there no such formula for the fourth kind, the activations, and on what do they depend that the "
    "other three do not?",
    answer="Weights, gradients and Adam's moments are one number for each parameter, whatever the model computes. "
    "Activations depend on the data and on the code: on the batch and the length of its rows, on the dtype of the "
    "computation, on which intermediate results each operation keeps for its backward, whether attention keeps its "
    "scores, on dropout masks, and on gradient checkpointing. They have to be measured, or counted operation by "
    "operation.",
)


# A scheme decides on levels and on no byte. "fp4" is the one whose levels are no exercise.
SCHEME = "fp4"


def small(draw: Draw, most: int, **changes) -> GPTConfig:
    """At least two layers, an odd inner and a large V, so that what is forgotten can be told from its size."""
    H = draw.integer(2, max(2, most // 2))
    sizes = dict(vocab_size=4 * draw.integer(8, 15), hidden_size=H * 2 * draw.integer(1, most), num_attention_heads=H)
    sizes |= dict(intermediate_size=2 * draw.integer(1, 2 * most) + 1, num_hidden_layers=draw.integer(2, 3))
    return GPTConfig(**{**sizes, **changes})


def grouped(draw: Draw, most: int, **changes) -> GPTConfig:
    """Fewer keys and values than queries, and heads that are not C / H wide."""
    H, width = 4, draw.integer(1, most)
    heads = dict(num_attention_heads=H, num_key_value_heads=2, head_dim=2 * width + 2)
    return small(draw, most, hidden_size=H * 2 * width, **heads, **changes)


def count(config: GPTConfig, **changes) -> int:
    """Counted. parameters() gives a shared one once."""
    return sum(parameter.numel() for parameter in GPT(replace(config, **changes)).parameters())


def with_fields(config: GPTConfig, **changes):
    """For a slip: the count of a model of another shape, once it is asked for."""
    return lambda: count(config, **changes)


def letters(config: GPTConfig) -> dict:
    names = dict(C="hidden_size", H="num_attention_heads", K="num_key_value_heads", D="head_dim")
    names |= dict(inner="intermediate_size", V="vocab_size", L="num_hidden_layers")
    return {letter: getattr(config, name) for letter, name in names.items()}


def check_count(config: GPTConfig, slips: dict, **shown):
    """slips: what is counted too much or too little, or by a function."""
    right = count(config)
    slips = {sentence: right + off if isinstance(off, int) else off for sentence, off in slips.items()}
    slips["a count is a whole number: nothing is divided with /"] = float(right)
    expect(count_base_parameters(config), right, letters(config) | shown, slips, "parameters", 0)


@EXERCISE.property("count_base_parameters: embedding, head, matrices and norms")
def plain_model(draw: Draw):
    for most in SIZES:
        config = small(draw, most)
        C, _, _, _, inner, V, L = letters(config).values()
        slips = {
            "the norms are missing: two in each layer and a last one, C numbers each": -(2 * L + 1) * C,
            "the norms in the layers are missing: two of C numbers each": -2 * L * C,
            "the last norm is missing: it stands behind the layers, C numbers": -C,
            "a layer has two norms, one before attention and one before the MLP": -L * C,
            "the head is missing: it is a (V, C) of its own unless tie_word_embeddings": -V * C,
            "a layer is counted once: there are L of them": with_fields(config, num_hidden_layers=1),
            "the MLP has three matrices, gate, up and down": -L * C * inner,
            "attention has four matrices, q, k, v and o": -L * C * C,
        }
        check_count(config, slips)


@EXERCISE.property("count_base_parameters: fewer key/value heads, and heads that are not C / H wide")
def heads(draw: Draw):
    for most in SIZES:
        config = grouped(draw, most)
        C, H, _, D, _, _, L = letters(config).values()
        slips = {
            "k and v are not as wide as q: they have K heads, K·D outputs": with_fields(config, num_key_value_heads=H),
            "D is config.head_dim: C / H is its default and not always its value": with_fields(config, head_dim=C // H),
            "q and o are not C x C: q has H·D outputs, and o as many inputs": 2 * L * C * (C - H * D),
            "o is not C x C: it has H·D inputs": L * C * (C - H * D),
        }
        check_count(config, slips)


@EXERCISE.property("count_base_parameters: a tied head is the embedding itself")
def tied(draw: Draw):
    for most in SIZES:
        config = small(draw, most, tie_word_embeddings=True)
        slip = "the tied matrix is counted twice: with tie_word_embeddings the head is the embedding"
        check_count(config, {slip: config.vocab_size * config.hidden_size}, tie_word_embeddings=True)


@EXERCISE.property("count_base_parameters: biases where the config asks for them")
def biases(draw: Draw):
    for most in SIZES:
        config = grouped(draw, most)
        C, H, K, D, inner, V, L = letters(config).values()
        slips = {
            "the biases of attention are missing": with_fields(config, attention_bias=False),
            "the bias of o has C numbers, one for each output": L * (H * D - C),
            "the biases of k and v have K·D numbers each": 2 * L * (H - K) * D,
            "o has a bias as well, of C numbers": -L * C,
            "the output head never has a bias": V,
        }
        check_count(replace(config, attention_bias=True), slips, attention_bias=True)
        slips = {
            "the biases of the MLP are missing": with_fields(config, mlp_bias=False),
            "down has C outputs, so a bias of C numbers": L * (inner - C),
            "down has a bias as well, of C numbers": -L * C,
        }
        check_count(replace(config, mlp_bias=True), slips, mlp_bias=True)


def check_stored(layer: Linear4bit, slips: dict[str, int]):
    right = sum(buffer.nbytes for buffer in layer.buffers())
    slips["bytes are whole numbers: round up with math.ceil"] = float(right)
    case = {"in": layer.in_features, "out": layer.out_features, "quantization": layer.quantization}
    expect(bytes_in_4_bits(layer), right, case, slips, "bytes", 0)


@EXERCISE.property("bytes_in_4_bits: two codes in a byte, a float32 scale for each block, a short one too")
def four_bits(draw: Draw):
    odd = [(2 * draw.integer(4, 9) + 1, 2 * draw.integer(4, 9) + 1) for _ in range(4)]  # no whole number of blocks
    for inside, out in [(8, 8), (16, 12), *odd]:
        size = draw.choice((16, 32, 64))
        layer = Linear4bit(inside, out, True, Quantization(SCHEME, size, False))
        n = inside * out
        codes, scales = (n + 1) // 2, 4 * -(-n // size)
        slips = {
            "the scales are missing: 4 bytes for each block": codes,
            "the last, short block has a scale too: round N up": codes + 4 * (n // size),
            "an odd number of codes takes its last byte as a whole: round n/2 up": n // 2 + scales,
            "two codes fit in a byte": n + scales,
            "these are bits and not bytes": 4 * n + 8 * scales,
            "without double quantization a scale is a float32, 4 bytes": codes + scales // 4,
            "the bias is not in 4 bits: predict counts it with the rest": codes + scales + 4 * out,
        }
        check_stored(layer, slips)


@EXERCISE.property("bytes_in_4_bits: one byte a scale under double quantization, a float32 for 256 of them, an offset")
def doubled(draw: Draw):
    odd = [(2 * draw.integer(2, 60) + 1, 2 * draw.integer(30, 60) + 1) for _ in range(4)]
    for inside, out in [(64, 128), *odd]:  # the first: 512 blocks of 16, where nothing is rounded
        n = inside * out
        blocks, codes = -(-n // 16), (n + 1) // 2
        slips = {
            "that is a layer without double quantization": codes + 4 * blocks,
            "under double quantization a scale takes one byte": codes + 4 * blocks - 4 * (-blocks // 256) + 4,
            "256 scales share a float32, a short group has one too: round N/256 up": codes
            + blocks // 256 * 4
            + blocks
            + 4,
            "the scales of the scales are missing: a float32 for each 256": codes + blocks + 4,
        }
        if blocks % 256 == 0:  # where a group forgotten does not come to the same number
            slips["the offset is missing: one float32, 4 bytes"] = codes + blocks - 4 * (-blocks // 256)
        check_stored(Linear4bit(inside, out, False, Quantization(SCHEME, 16, True)), slips)


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def check_bytes(model: GPT, dtype: torch.dtype, slips: dict[str, dict[str, int]], **shown):
    """predict beside what is counted: the model's tensors, gradients, and what a real AdamW holds after a step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    right = {"weights": nbytes([*model.parameters(), *model.buffers()]), "gradients": nbytes(p.grad for p in trained)}
    right["optimizer"] = nbytes(tensor for state in optimizer.state.values() for tensor in state.values())

    n, tensors = sum(parameter.numel() for parameter in trained), len(trained)
    one = right["gradients"]  # bytes of one number for each that is trained
    adam = {
        "the step counts are missing: AdamW keeps one of 4 bytes for each trained tensor": 2 * one,
        "AdamW keeps two averages of each trained number: you count one": one + 4 * tensors,
        "AdamW keeps a step count for each trained tensor, not one for all": 2 * one + 4,
        "a step count takes 4 bytes": 2 * one + tensors,
        "only trained tensors have a step count": 2 * one + 4 * len(list(model.parameters())),
        "the averages have the dtype of their weight": 2 * (6 * n - one) + 4 * tensors,
        "the gradients are a kind of their own": 3 * one + 4 * tensors,
    }
    found = predict(model, dtype)
    case = {"dtype": dtype, **shown} | letters(model.config)
    named = isinstance(found, dict) and found.keys() == right.keys()
    require(named, f"expected a dict with the keys {', '.join(right)}, got {found!r}", case)
    for kind, value in right.items():
        more = {"optimizer": adam}.get(kind, {}) | {"bytes are whole numbers: nothing is divided with /": float(value)}
        expect(found[kind], value, case, slips.get(kind, {}) | more, kind, 0)


@EXERCISE.property("predict: full fine-tuning, in bfloat16 and in float32")
def full(draw: Draw):
    for most, dtype in ((2, torch.bfloat16), (2, torch.float32), (4, torch.bfloat16)):
        model = GPT(small(draw, most, tie_word_embeddings=draw.choice((True, False)))).to(dtype)
        other = {
            f"a number of the base takes {dtype.itemsize} bytes here, its dtype's itemsize": (
                (6 - dtype.itemsize) * count(model.config)
            )
        }
        no_gradients = {"without adapters every weight is trained and has a gradient": 0}
        check_bytes(model, dtype, {"weights": other, "gradients": other | no_gradients}, method="full")


def check_adapters(draw: Draw, model: GPT, dtype: torch.dtype, slips: dict[str, int], method: str):
    """Puts adapters of several ranks in. slips: what is too much or too little in the weights of the base."""
    base, base_size = nbytes([*model.parameters(), *model.buffers()]), dtype.itemsize * count(model.config)
    model.requires_grad_(False)
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Linear4bit))]
    adapters = []
    for name in draw.choice((names[:1], names[1:-1:2], names[:-1])):  # the last is the head
        adapters.append(assemble(draw, model.get_submodule(name), draw.integer(1, 4), 8))
        for parameter in (adapters[-1].lora_A, adapters[-1].lora_B):
            parameter.data = parameter.data.float()
        replace_module(model, name, adapters[-1])
    of_A, of_B = (sum(getattr(layer, part).numel() for layer in adapters) for part in ("lora_A", "lora_B"))
    a = of_A + of_B
    weights = {
        "adapters are float32, 4 bytes a number, whatever the dtype of the base": base + dtype.itemsize * a,
        "the adapters are missing: r·(in + out) numbers each": base,
        "B is missing: an adapter has r·in numbers in A and r·out in B": base + 4 * of_A,
        "A is missing: an adapter has r·in numbers in A and r·out in B": base + 4 * of_B,
    }
    gradients = {
        "gradients of adapters are float32 as they are, 4 bytes a number": dtype.itemsize * a,
        "the base is frozen: only A and B have gradients": base_size + 4 * a,
        "that is full fine-tuning; here only A and B have gradients": base_size,
    }
    slips = {"weights": weights | {sentence: base + 4 * a + off for sentence, off in slips.items()}}
    check_bytes(model, dtype, slips | {"gradients": gradients}, method=method, adapters=len(adapters))


@EXERCISE.property("predict: LoRA, a frozen base in bfloat16 or float32, adapters of any rank in float32")
def low_rank(draw: Draw):
    for most, dtype in ((2, torch.bfloat16), (2, torch.float32), (4, torch.bfloat16)):
        check_adapters(draw, GPT(small(draw, most)).to(dtype), dtype, {}, "lora")


@EXERCISE.property("predict: QLoRA, the linear layers in 4 bits, their biases and the rest in dtype")
def quantized(draw: Draw):
    for most, dtype in ((2, torch.bfloat16), (2, torch.float32)):
        model = GPT(grouped(draw, most, mlp_bias=True)).to(dtype)
        in_floats = stored = of_biases = 0
        for name, linear in float_linears(model).items():
            options = linear.bias is not None, Quantization(SCHEME, 16, draw.choice((True, False)))
            layer = Linear4bit(linear.in_features, linear.out_features, *options, dtype=dtype)
            replace_module(model, name, layer)
            in_floats, stored = in_floats + linear.weight.nbytes, stored + nbytes(layer.buffers())
            of_biases += nbytes(layer.parameters())
        slips = {
            "weights in 4 bits are counted in dtype as well: take in·out off for each such layer": in_floats,
            "these layers are in 4 bits, and you count them in dtype": in_floats - stored,
            "the codes and scales are missing: bytes_in_4_bits for each such layer": -stored,
            "the biases of layers in 4 bits are missing: they stay in dtype": -of_biases,
        }
        check_adapters(draw, model, dtype, slips, "qlora")
