"""Starts that need more than a weight: LoftQ a quantizer, EVA data; and LoRA-FA, which freezes A where it started.

B = 0 and a random A say nothing about the layer. Other starts say more, through `LoRAConfig.init_lora_weights`:

    True        A uniform within ±1/√in, B = 0 (Hu et al. 2021)
    "gaussian"  A normal with standard deviation 1/r, B = 0
    "pissa"     the largest singular directions of W, which leave the base for the adapter (Meng et al. 2024)
    "olora"     the same with a QR decomposition (Büyükakyüz 2024)
    "eva"       A the directions in which the layer's inputs vary most, B = 0 (Paischer et al. 2024):
                like True until `eva_start` has seen data
    LoftQ       the part of W that 4 bits lose (Li et al. 2023): `apply_loftq`

PiSSA and OLoRA change the base and are undone on saving (`inject.extract_adapter`). LoftQ makes a base of its own, and
its adapter fits no other. The rest leave the base alone. What each computes from a weight is in `factors.py`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minilora.adapters.factors import loftq
from minilora.adapters.inject import apply_lora, check_targets, lora_layers, pattern_value
from minilora.lora import LoRAConfig, lora_scaling
from minilora.quant import (
    Linear4bit,
    check_finite,
    check_settings,
    float_linears,
    put,
    quantize_model,
    quantized_layers,
)


@torch.no_grad()
def apply_loftq(
    model: nn.Module,
    config: LoRAConfig,
    scheme: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    rounds: int = 5,
) -> nn.Module:
    """`quantize_model` and `apply_lora`, with A and B that put back what 4 bits lose. Changes and returns the model.

    PEFT leaves s out, so its start is right where lora_alpha = r. `factors.loftq` tells the errors of one weight. The
    adapter fits this 4-bit base and no other, so keep both: `save_adapter`, then `remove_lora` and `save_model`.

    Raises ValueError, before anything is changed, for what apply_lora and quantize_model refuse, rounds below 1, an r
    above a layer's full rank, another start in the config, and DoRA, whose magnitude would start from Q alone.
    """
    check_settings(scheme, block_size)
    if type(rounds) is not int or rounds < 1:
        raise ValueError(f"rounds is {rounds!r}; it must be a whole number of at least 1")
    if config.init_lora_weights is not True or config.use_dora:
        found = "use_dora" if config.use_dora else f"init_lora_weights {config.init_lora_weights!r}"
        raise ValueError(f"LoftQ is a start of its own and does not go together with {found}")
    targets, in_4_bits, linears = check_targets(model, config), quantized_layers(model), float_linears(model)
    ranks = {name: pattern_value(config.rank_pattern, name, config.r) for name in targets}
    for name in targets:
        if name in in_4_bits:
            raise ValueError(f"{name} is in 4 bits already, and what that lost is gone; LoftQ starts on a float model")
        if name in linears and ranks[name] > (full := min(linears[name].weight.shape)):
            raise ValueError(f"LoftQ cannot give r={ranks[name]} directions of {name}, which has {full}")
    for name, linear in linears.items():
        check_finite(f"{name}.weight", linear.weight)

    starts = {}
    for name in [name for name in targets if name in linears]:  # not the output head, which keeps its floats
        linear, r = linears.pop(name), ranks[name]
        s = lora_scaling(r, pattern_value(config.alpha_pattern, name, config.lora_alpha), config.use_rslora)
        quantized, A, B, _ = loftq(linear.weight, r, s, scheme, block_size, double_quant, rounds)
        put(model, name, Linear4bit.from_linear(linear, quantized))
        starts[name] = A, B
    if linears:  # no targets
        linears.clear()
        quantize_model(model, scheme, block_size, double_quant)
    apply_lora(model, config)
    for name, (A, B) in starts.items():
        layer = model.get_submodule(name)
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    return model


@torch.no_grad()
def eva_start(model: nn.Module, batches: Tensor | Iterable[Tensor]) -> nn.Module:
    """Sets A of every LoRA layer to the first r right singular vectors of its inputs on `batches`; B stays 0.

    batches: ids (N, T), or several of them; every token counts. Call it after `apply_lora`, on a float base or one in
    4 bits. The right singular vectors of X (tokens, in) are the eigenvectors of XᵀX, which is summed up over batches in
    float64: in² numbers a layer while it runs, exact. The paper updates an SVD of r directions batch by batch instead,
    which needs r·in numbers and drops the rest each time; PEFT takes the mean off as well. The paper also moves ranks
    from layer to layer by how much variance each explains; here every layer keeps its own.

    Raises ValueError for a model without LoRA layers, one whose B is not 0, and fewer tokens than ranks.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA layers to start; apply_lora(model, config) comes first")
    for name, layer in layers.items():
        if layer.lora_B.any():
            raise ValueError(f"{name} has a B that is not 0: it was trained, or has a start of its own")
    sums, tokens = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def watch(name: str):
        def add(module: nn.Module, inputs: tuple[Tensor]):
            X = inputs[0].reshape(-1, module.in_features)  # (tokens, in)
            X = X.to("cpu" if X.device.type == "mps" else X.device).double()  # MPS has no float64
            sums[name] = sums[name] + X.T @ X  # (in, in)
            tokens[name] += len(X)

        return add

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    training, device = model.training, next(model.parameters()).device
    try:
        model.eval()
        for input_ids in batches.split(8) if isinstance(batches, Tensor) else batches:
            model(input_ids.to(device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        if layer.r > min(tokens[name], layer.in_features):
            raise ValueError(
                f"{tokens[name]} tokens of {layer.in_features} features cannot give r={layer.r} directions for {name}"
            )
    for name, layer in layers.items():
        vectors = torch.linalg.eigh(sums[name]).eigenvectors  # by columns, in ascending order
        layer.lora_A.copy_(vectors[:, -layer.r :].T.flip(0))
    return model


def freeze_A(model: nn.Module) -> nn.Module:
    """LoRA-FA (Zhang et al. 2023): A stays as it started, and only B is trained. Changes and returns the model.

    Half the trained numbers, but that is not the point: B's gradient needs A x alone, r numbers a token, so the layer
    keeps its input x no longer. Raises ValueError for a model without LoRA layers.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA layers; apply_lora(model, config) comes first")
    for layer in layers.values():
        layer.lora_A.requires_grad_(False)
    return model
