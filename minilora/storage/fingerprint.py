"""Which base a file was trained on: 64 hex digits from the weights of a model."""

import hashlib
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from minilora.adapters.inject import lora_layers
from minilora.linear4bit import quantized_layers
from minilora.model import GPT
from minilora.storage.quantized import layer_tensors


def fingerprint(model: GPT) -> str:
    """64 hex digits that identify the base's weights, with LoRA applied, merged or absent.

    A SHA-256 over the plain name and the mark of each weight. So a 7B model is read through once and little of it is
    hashed.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(base_weights(model, original=True).items()):
        digest.update(f"{name} {weight_mark(weight)}\n".encode())
    return digest.hexdigest()


def weight_mark(weight: Tensor) -> str:
    """Shape, the sum of all values, and every n-th value (about 4096 of them).

    The sum notices a change anywhere, the sample a change of order. The sum adds bit patterns, four values to a 64-bit
    integer: unlike a sum of floats it is exact, so it depends neither on the machine nor on the number of threads nor
    on the order of adding.

    Values are rounded to bfloat16 first, so a base has one mark whether it is loaded as float32 or bfloat16. The price:
    changes too small to show in bfloat16 (under 1/256 of a weight) pass unnoticed, though hardly in all weights at
    once. A float32 file loaded as float16 is rounded twice and counts as another base.
    """
    values = weight.detach().to(torch.bfloat16).flatten()
    total = F.pad(values, (0, -len(values) % 4)).view(torch.int64).sum().item()
    sample = values[:: max(1, len(values) // 4096)].view(torch.int16).tolist()
    return f"{tuple(weight.shape)} {total} {sample}"


def base_weights(model: GPT, original: bool = False) -> dict[str, Tensor]:
    """The tensors under their plain Llama names, as they are written: a tied head once, adapters left out.

    With `original`, which base this is: for a merged layer the frozen weight from before the merge, and weights in 4
    bits without the dtype that they came in.
    """
    layers = dict(lora_layers(model))
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in layers:  # the parameters of a LoRALinear itself are the adapter
            weights[name.replace(".base_layer.", ".")] = parameter
    for name, linear in quantized_layers(model).items():
        quantized = linear.quantized
        if original:  # the dtype that the codes are turned back into is not what the base is
            quantized = replace(quantized, dtype=torch.float32)
        weights |= layer_tensors(name.replace(".base_layer", ""), quantized)
    for name, layer in layers.items():
        if original and layer.original_weight is not None:
            weights[f"{name}.weight"] = layer.original_weight
    return weights
