"""Variants of LoRA in how A and B are trained. DoRA is a layer of its own (`dora.py`), rsLoRA a flag in the config."""

from torch import nn

from minilora.adapters.inject import lora_layers


def loraplus_groups(model: nn.Module, lr: float, ratio: float = 16) -> list[dict]:
    """Optimizer parameter groups of LoRA+ (Hayou et al. 2024): B learns at ratio · lr, everything else at lr.

    In a wide layer the steps that suit A are too small for B by a factor that grows with the width. DoRA's magnitude
    goes with B, as one-dimensional parameters do in PEFT. Every trainable parameter is in exactly one group; `train`
    takes them as `parameter_groups`. Raises ValueError for rates not above 0 and for a model without LoRA layers.
    """
    if not (lr > 0 and ratio > 0):
        raise ValueError(f"lr is {lr!r} and ratio {ratio!r}; both must be above 0")
    fast = [p for _, layer in lora_layers(model) for p in layer.parameters(recurse=False) if p is not layer.lora_A]
    if not fast:
        raise ValueError("the model has no LoRA layers, so there is no B to learn faster; apply_lora comes first")
    chosen = set(fast)
    slow = [p for p in model.parameters() if p.requires_grad and p not in chosen]
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": ratio * lr}]


def freeze_A(model: nn.Module) -> nn.Module:
    """LoRA-FA (Zhang et al. 2023): A stays as it started, and only B is trained. Changes and returns the model.

    About half of the numbers are trained, but the point is another: B's gradient needs only A x, r numbers a token, so
    the layer no longer keeps its input x for backward. Raises ValueError for a model without LoRA layers.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA layers; apply_lora(model, config) comes first")
    for layer in layers.values():
        layer.lora_A.requires_grad_(False)
    return model
