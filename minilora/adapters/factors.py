"""From a weight W (out, in) to A (r, in) and B (out, r) that hold a part of it: the arithmetic of other starts.

    pissa   W = U S Vᵀ      s·BA = U_r S_r V_rᵀ, the r largest singular values (Meng et al. 2024, section 3)
    olora   W = Q R         BA = Q_r R_r, orthonormal columns of B (Büyükakyüz 2024)
    loftq   W ≈ Q + s·BA    Q in 4 bits, BA what the rounding lost (Li et al. 2023, algorithm 1)

The decompositions are whole ones, so the same weight gives the same start. Their cost grows with the cube of the width:
0.1 s on one core at 512, so a minute at 4096. PEFT also offers a randomized SVD ("pissa_niter_16"), faster and near it.

Letters in the shape comments: in and out the layer's features, r rank, k = min(in, out).
"""

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.lora import LoRAConfig, LoRALinear
from minilora.quant import QuantizedTensor, dequantize, quantize


def energy_rank(singular_values: Tensor, share: float) -> int:
    """The fewest of a matrix's singular values, (k,) from the largest on, whose squares add up to `share` of them all.

    Σ σ_i² = ‖W‖² is the matrix's energy: the best approximation of that rank misses 1 - share of it (Eckart and Young
    1936). At least 1. Raises ValueError for a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share!r}; it must be above 0 and at most 1")
    energy = singular_values.double().square().cumsum(0)  # of the first 1, 2, ... k
    return min(int((energy < share * energy[-1]).sum()) + 1, len(energy))


def pissa(W: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A = √(S_r / s) V_rᵀ and B = U_r √(S_r / s): no other s·BA of rank r is nearer to W."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)  # (out, k), (k,), (k, in)
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def olora(W: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A = R_r and B = Q_r, whatever s is, as in PEFT: s·BA is then s times a part of W."""
    Q, R = torch.linalg.qr(W)  # (out, k), (k, in)
    return R[:r], Q[:, :r]


STARTS_FROM_WEIGHT = {"pissa": pissa, "olora": olora}


def loftq(
    W: Tensor,
    r: int,
    scaling: float,
    scheme: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    rounds: int = 5,
) -> tuple[QuantizedTensor, Tensor, Tensor, list[float]]:
    """Q in 4 bits, A, B, and the errors ‖W - (Q + s·BA)‖ / ‖W‖: of rounding alone, then after each round.

        Q = quantize(W - s·BA)        s·BA = the best of rank r for W - Q

    The second step never makes the error larger, the first may: it rounds another matrix, to other scales. So the best
    round is kept, and not the last. The first round starts at BA = 0 and cannot be worse than rounding alone.
    """
    wide = W.detach().to(torch.promote_types(W.dtype, torch.float32))
    size, product, errors = wide.norm().clamp(min=torch.finfo(wide.dtype).tiny), torch.zeros_like(wide), []
    for _ in range(rounds):
        quantized = quantize((wide - product).to(W.dtype), scheme, block_size, double_quant)
        residual = wide - dequantize(quantized, wide.dtype)
        if not errors:
            errors.append((residual.norm() / size).item())
        A, B = pissa(residual, r, scaling)
        product = scaling * B @ A
        errors.append(((residual - product).norm() / size).item())
        if errors[-1] <= min(errors[1:]):
            best = quantized, A, B
    return *best, errors


def start_layer(layer: LoRALinear, start: bool | str):
    """Gives A and B their first values, as `LoRAConfig.init_lora_weights` says. True and "eva" are left as made.

    "pissa" and "olora" move a part of W into the adapter, W ← W - s·BA, so that the layer still computes what it did:
    exactly up to rounding, and on a half-precision base up to its own coarse rounding. A and B at the start are
    remembered, r·(in + out) numbers, and no second W: disabled, the layer is W_rest x + s·B₀(A₀ x). Dropout would now
    drop a part of W itself, the largest: leave it at 0.
    """
    if start == "gaussian":
        nn.init.normal_(layer.lora_A, std=1 / layer.r)
    elif start in STARTS_FROM_WEIGHT:
        weight = layer.base_layer.weight.detach()
        layer.original_mark = weight_mark(weight)
        layer.start_from(*STARTS_FROM_WEIGHT[start](weight.to(layer.lora_A.dtype), layer.r, layer.scaling))


def check_own_weight(name: str, layer: nn.Module, users: dict[int, list[str]], r: int, start: str):
    """Raises ValueError for a layer in 4 bits, one that shares its weight (`users`), and an r above its full rank."""
    if type(layer) is not nn.Linear:
        raise ValueError(
            f"init_lora_weights {start!r} takes a part of W out of {name}, which is a {type(layer).__name__}: what is "
            "left would have to be rounded again; start on the float model and quantize_model after, or apply_loftq"
        )
    if len(shared := users[id(layer.weight)]) > 1:
        raise ValueError(
            f"init_lora_weights {start!r} changes the weight of {name}, which {' and '.join(shared)} share"
        )
    if r > (full := min(layer.weight.shape)):
        raise ValueError(f"init_lora_weights {start!r} cannot give r={r} directions of {name}, which has {full}")


def plain_config(config: LoRAConfig) -> LoRAConfig:
    """The config of a plain adapter that does the same: a copy, for pissa and olora with 2r at the same scaling."""
    plain = replace(copy.deepcopy(config), init_lora_weights=True)
    if config.init_lora_weights in STARTS_FROM_WEIGHT:
        times = math.sqrt(2) if config.use_rslora else 2  # s = alpha / √r, or alpha / r
        plain.r, plain.lora_alpha = 2 * plain.r, times * plain.lora_alpha
        plain.rank_pattern = {key: 2 * r for key, r in plain.rank_pattern.items()}
        plain.alpha_pattern = {key: times * alpha for key, alpha in plain.alpha_pattern.items()}
    return plain


def check_original_left(layers: dict[str, LoRALinear]):
    """Raises ValueError for a layer put into 4 bits after its start: A₀ and B₀ then no longer make it the original."""
    for name, layer in layers.items():
        if layer.moved and type(layer.base_layer) is not nn.Linear:
            raise ValueError(
                f"{name} was put into 4 bits after its start had taken a part of W out, so the original is gone; "
                "dequantize_model(model), merge_lora(model) and save_model keep what was trained"
            )


def weight_mark(weight: Tensor) -> str:
    """What the fingerprint of a base says of one weight (`storage.models.fingerprint`): shape, sum and a sample."""
    values = weight.detach().to(torch.bfloat16).flatten()
    total = F.pad(values, (0, -len(values) % 4)).view(torch.int64).sum().item()
    sample = values[:: max(1, len(values) // 4096)].view(torch.int16).tolist()
    return f"{tuple(weight.shape)} {total} {sample}"
