"""The memory of a fine-tune at any size, measured on a laptop: the real training step on fake tensors.

A fake tensor has a shape, a dtype and a storage of the right size that holds nothing. Every operation works out the
shape of its result and computes no number. So `simulate` builds the real `GPT`, applies the real `apply_lora`, runs
the `training_step` of real training under the real `MemoryMeter`, and reads off the bytes that a machine large enough
would hold. Nothing here knows how much attention or LoRA allocates. Beside the measurement stands the prediction of a
formula for three kinds of bytes; for activations there is no short one.

What a parameter costs in bytes, with Adam:

    dtype                        weight  gradient  Adam   sum
    bfloat16                        2       2       4       8     all in bfloat16, the default: small updates round away
    float32                         4       4       8      16
    float32 with autocast           4       4       8      16     and bfloat16 copies of the matrices, as activations
    mixed precision in ZeRO       2 + 4     2       8      16     a float32 master copy (Rajbhandari 2020, section 3.1)

LoRA keeps the base in `dtype`, frozen, and its adapters in float32, as PEFT does: 16 bytes, for few parameters. QLoRA
keeps the block linears in 4 bits, 0.516 bytes a weight with double quantization, and the rest in `dtype`.

What is simulated is torch on a CPU; its attention there, as the flash kernels on CUDA, keeps no (T, T) scores.
Real memory on a GPU is higher: the meter's docstring says what it does not see.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minilora.adapters.inject import apply_lora, count_parameters, lora_layers
from minilora.config import LoRAConfig
from minilora.dtypes import DTYPES
from minilora.linear4bit import Linear4bit, float_linears, quantized_layers, replace_module
from minilora.memory import KINDS, Bytes, MemoryMeter, format_bytes
from minilora.model import GPT, GPTConfig
from minilora.objectives import Preference
from minilora.quant import QLORA, SCALE_BLOCK, Quantization
from minilora.ranges import whole
from minilora.train import make_optimizer, set_gradient_checkpointing, training_step
from minilora.train_settings import CROSS_ENTROPY, TrainConfig

SIMULATED_METHODS = ("full", "lora", "qlora")  # the others keep much the same bytes as one of these
SIMULATED_DTYPES = ("bfloat16", "float32")
SIMULATED_OBJECTIVES = ("sft", "dpo")


@dataclass
class MemoryReport:
    """Bytes of tensors of one training step.

    Each kind is given at its own largest. They do not add up to `peak`, because activations are largest before
    backward and gradients after it; `at_peak` is the split that does add up.
    """

    title: str
    trainable_parameters: int
    total_parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    at_peak: Bytes
    predicted: dict[str, int]  # weights, gradients and optimizer by formula
    weights_itemsize: int  # bytes of a weight that is not in 4 bits

    def as_dict(self) -> dict[str, int]:
        """{"weights", "gradients", "optimizer", "activations", "peak"}, in bytes."""
        return {name: getattr(self, name) for name in [*KINDS, "peak"]}

    def table(self) -> str:
        """Predicted beside simulated bytes, and the split at the peak."""
        trainable, total = self.trainable_parameters, self.total_parameters
        parameters = f"trainable params: {trainable:,d} || all params: {total:,d}"
        lines = [
            self.title,
            f"{parameters} || trainable%: {100 * trainable / total:.4f}\n",
            f"{'bytes of tensors':18}{'formula':>14}{'simulated':>14}{'at the peak':>14}",
        ]
        for name, at_peak in {**asdict(self.at_peak), "peak": self.at_peak.total}.items():
            predicted = format_bytes(self.predicted[name]) if name in self.predicted else "-"
            lines.append(f"{name:18}{predicted:>14}{format_bytes(getattr(self, name)):>14}{format_bytes(at_peak):>14}")
        lines.append(f"\n1 GiB is 1024 MiB or {2**30:,d} bytes; the peak is {self.peak / 1e9:,.2f} GB of 10^9 bytes.")
        lines.append("simulated: the largest of each kind, at whatever moment; at the peak: all at the one moment.")
        return "\n".join(lines)


def simulate(
    config: GPTConfig | str,
    method: str = "full",
    batch_size: int = 1,
    sequence_length: int = 2048,
    dtype: str = "bfloat16",
    autocast: bool = False,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] | str = ("q_proj", "v_proj"),
    gradient_checkpointing: bool = False,
    accumulation_steps: int = 1,
    quantization: Quantization = QLORA,
    counted_tokens: int | None = None,
    objective: str = "sft",
) -> MemoryReport:
    """Measures the bytes of one training step of GPT(config), without its memory and without its arithmetic.

    config: a GPTConfig or the name of a preset. method: "full", "lora" or "qlora"; r, lora_alpha, lora_dropout and
        target_modules are as in LoRAConfig, for the latter two; quantization is qlora's.
    batch_size: sequences per optimizer step; accumulation_steps cuts it, as in TrainConfig.
    counted_tokens: of each sequence, in the loss; logits are made for these alone. None: all but the first, which no
        token predicts.
    objective: "sft", cross entropy, or "dpo", where a batch has pairs of sequences and the reference is the model with
        its adapter off, or for method "full" log-probabilities that were computed beforehand.
    dtype: of the weights, "bfloat16" or "float32". autocast: matrix products in bfloat16 whatever the weights are.

    Raises ValueError for an unknown preset, method or dtype, a sequence longer than the model's, and all that
    LoRAConfig, apply_lora and TrainConfig refuse.
    """
    name, config = (config, GPTConfig.preset(config)) if isinstance(config, str) else ("GPT", config)
    for what, value, known in (
        ("method", method, SIMULATED_METHODS),
        ("dtype", dtype, SIMULATED_DTYPES),
        ("objective", objective, SIMULATED_OBJECTIVES),
    ):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")
    whole(1, config.max_position_embeddings).check("sequence_length", sequence_length)
    counted = sequence_length - 1 if counted_tokens is None else counted_tokens  # the first is predicted by nothing
    whole(0, sequence_length - 1).check("counted_tokens", counted)
    lora_config = LoRAConfig(r, lora_alpha, lora_dropout, target_modules)
    precision = "bfloat16" if autocast else "float32"
    train_config = TrainConfig(1, batch_size, 1e-4, accumulation_steps=accumulation_steps, precision=precision)
    with FakeTensorMode(allow_non_fake_inputs=True):  # the tables of levels are real
        model = build(config, DTYPES[dtype])
        if method == "qlora":
            empty_4bit(model, quantization)
        if method != "full":
            apply_lora(model, lora_config)
        set_gradient_checkpointing(model, gradient_checkpointing)
        optimizer = make_optimizer(model, train_config)
        pairs = objective == "dpo"
        ids = torch.zeros(batch_size, *[2] * pairs, sequence_length, dtype=torch.int64)
        reference = [torch.zeros(batch_size, 2)] * (pairs and method == "full")
        goal = Preference() if pairs else CROSS_ENTROPY
        make_optimizer_state(optimizer)
        with MemoryMeter(model, optimizer) as meter:
            training_step(model, optimizer, ids, ids, train_config, counted, goal, reference)

    trainable, total = count_parameters(model)
    targets = target_modules if isinstance(target_modules, str) else ", ".join(target_modules)
    what = "full fine-tuning" if method == "full" else f"{'Q' * (method == 'qlora')}LoRA r={r} on {targets}"
    weights = f"{quantization.scheme} linears, rest {dtype}" if method == "qlora" else f"{dtype} weights"
    options = [weights] + ["autocast"] * autocast + ["checkpointing"] * gradient_checkpointing
    tokens = f"{'2 x ' * pairs}{sequence_length} tokens" + ("" if counted_tokens is None else f" ({counted} counted)")
    title = f"{name}, {what}{', DPO' * pairs}, batch {batch_size} x {tokens}, {', '.join(options)}"
    predicted = predict(model, DTYPES[dtype])
    more = dict(at_peak=meter.peak, predicted=predicted, weights_itemsize=DTYPES[dtype].itemsize)
    return MemoryReport(title, trainable, total, **meter.highest, **more)


def build(config: GPTConfig, dtype: torch.dtype) -> GPT:
    """GPT(config) with all weights in `dtype` from the start: `.to(dtype)` cannot replace fake parameters."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return GPT(config)
    finally:
        torch.set_default_dtype(before)


def empty_4bit(model: GPT, quantization: Quantization):
    """Puts in the layers that quantize_model makes, without numbers: fake ones cannot be rounded."""
    for name, linear in float_linears(model).items():
        options = linear.bias is not None, quantization, linear.weight.device, linear.weight.dtype
        replace_module(model, name, Linear4bit(linear.in_features, linear.out_features, *options))


def make_optimizer_state(optimizer: torch.optim.Optimizer):
    """One optimizer step on gradients of zero. It makes the state that is there in every real step but the first."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def count_base_parameters(config: GPTConfig) -> int:
    """Parameters of GPT(config) in closed form, letters as in model.py, L layers."""
    C, D, inner, V = config.hidden_size, config.head_dim, config.intermediate_size, config.vocab_size
    H, K, L = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    attention = 2 * C * H * D + 2 * C * K * D  # q and o, k and v
    if config.attention_bias:
        attention += H * D + 2 * K * D + C
    mlp = 3 * C * inner  # gate, up, down
    if config.mlp_bias:
        mlp += 2 * inner + C
    embeddings = V * C if config.tie_word_embeddings else 2 * V * C
    return embeddings + L * (attention + mlp + 2 * C) + C  # two norms a layer and the last


def predict(model: GPT, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by formula: n base parameters in `dtype` or 4 bits, and r·(in + out) float32 numbers for each adapter."""
    base = count_base_parameters(model.config)
    rounded = quantized_layers(model).values()
    in_4_bits = sum(layer.in_features * layer.out_features for layer in rounded)
    adapters = sum(layer.r * (layer.in_features + layer.out_features) for _, layer in lora_layers(model))
    tensors = sum(parameter.requires_grad for parameter in model.parameters())
    gradients = 4 * adapters if adapters else dtype.itemsize * base  # one number for each that is trained
    return {
        "weights": dtype.itemsize * (base - in_4_bits) + sum(map(bytes_in_4_bits, rounded)) + 4 * adapters,
        "gradients": gradients,
        "optimizer": 2 * gradients + 4 * tensors,  # AdamW: two averages, and a step count for each tensor
    }


def bytes_in_4_bits(layer: Linear4bit) -> int:
    """n/2 for the codes; for N = n / block_size scales 4 N, or N + 4 N/256 + 4 under double quantization."""
    n = layer.in_features * layer.out_features
    blocks = math.ceil(n / layer.quantization.block_size)
    scales = blocks + 4 * math.ceil(blocks / SCALE_BLOCK) + 4 if layer.quantization.double_quant else 4 * blocks
    return math.ceil(n / 2) + scales
