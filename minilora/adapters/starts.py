"""How A (r, in) and B (out, r) start: the names of `LoRAConfig.init_lora_weights`, and what each computes.

B = 0 and a random A say nothing about the layer. Other starts say more:

    True        A uniform within ±1/√in, B = 0 (Hu et al. 2021): what LoRALinear is made with
    "gaussian"  A normal with standard deviation 1/r, B = 0
    "pissa"     s·BA = U_r S_r V_rᵀ, the r largest singular values of W = U S Vᵀ (Meng et al. 2024, section 3)
    "olora"     BA = Q_r R_r of W = Q R: orthonormal columns of B (Büyükakyüz 2024)
    "eva"       A the r directions in which the layer's inputs vary most, B = 0 (Paischer et al. 2024)
    LoftQ       W ≈ Q + s·BA with Q in 4 bits: BA is what rounding lost (Li et al. 2023, algorithm 1); `apply_loftq`

With PiSSA and OLoRA B does not start at zero, so BA would change the layer. The papers take s·B₀A₀ out of W. Here W
stays as it is and the layer computes W x + s·(BA - B₀A₀) x, the same function. So W is exact after the adapter is
switched off or taken out. The price: the thin products have rank 2r, and W less its largest part, the matrix that the
papers keep in 4 bits, never exists here.

The decompositions are whole ones, so the same weight gives the same start. Their cost grows with the cube of the width:
0.1 s on one core at 512, so a minute at 4096. PEFT also offers a randomized SVD, "pissa_niter_16": faster, and near.

Letters in the shape comments: in and out the layer's features, r rank, k = min(in, out).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minilora.lora import LoRALinear
from minilora.modes import in_eval_mode
from minilora.quant import QLORA, Quantization, QuantizedTensor, dequantize, quantize


def energy_rank(singular_values: Tensor, share: float) -> int:
    """The fewest of a matrix's singular values, (k,) from the largest on, whose squares add up to `share` of them all.

    At least 1. Σ σ_i² = ‖W‖² is the matrix's energy: the best approximation of that rank misses 1 - share of the energy
    (Eckart and Young 1936). Raises ValueError for a share that is not above 0 and at most 1.
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
    quantization: Quantization = QLORA,
    rounds: int = 5,
    best_of_rank: Callable[[Tensor, int, float], tuple[Tensor, Tensor]] = pissa,
) -> tuple[QuantizedTensor, Tensor, Tensor, list[float]]:
    """Q in 4 bits, A, B, and the errors ‖W - (Q + s·BA)‖ / ‖W‖: of rounding alone, then after each round.

        Q = quantize(W - s·BA)        s·BA = the best of rank r for W - Q

    The second step never makes the error larger; the first may, because it rounds another matrix to other scales. So
    the best round is kept, and not the last. The first round starts at BA = 0 and cannot be worse than rounding alone.
    best_of_rank: (W, r, s) -> A, B with the s·BA of rank r that is nearest to W, found by whatever decomposition.
    """
    wide = W.detach().to(torch.promote_types(W.dtype, torch.float32))
    size, product = wide.norm().clamp(min=torch.finfo(wide.dtype).tiny), torch.zeros_like(wide)
    errors: list[float] = []
    for _ in range(rounds):
        quantized = quantize((wide - product).to(W.dtype), **asdict(quantization))
        residual = wide - dequantize(quantized, wide.dtype)
        if not errors:
            errors.append((residual.norm() / size).item())
        A, B = best_of_rank(residual, r, scaling)
        product = scaling * B @ A
        errors.append(((residual - product).norm() / size).item())
        if errors[-1] <= min(errors[1:]):
            best = quantized, A, B
    return *best, errors


@torch.no_grad()
def eva_directions(
    model: nn.Module, layers: Mapping[str, Any], ranks: Mapping[str, int], batches: Tensor | Iterable[Tensor]
) -> dict[str, Tensor]:
    """By layer, the first r right singular vectors of its inputs on `batches`, (r, in): where EVA's A starts.

    batches: ids (N, T), or several of them; every token counts. The right singular vectors of X (tokens, in) are the
    eigenvectors of XᵀX, which is summed over batches in float64: exact, at in² numbers a layer. The paper updates an
    SVD of r directions batch by batch, which needs r·in numbers and drops the rest each time, and PEFT takes the mean
    off as well. The paper also moves ranks from layer to layer; here every layer keeps its own. Raises ValueError for
    an r above the number of tokens or of features.
    """
    sums: dict[str, Tensor] = {}
    tokens = 0

    def add(name: str, layer: nn.Module, inputs: tuple[Tensor]):
        X = inputs[0].reshape(-1, inputs[0].shape[-1])  # (tokens, in)
        X = X.to("cpu" if X.device.type == "mps" else X.device).double()  # MPS has no float64
        sums[name] = X.T @ X + sums.get(name, 0)  # (in, in)

    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    device = next(model.parameters()).device
    try:
        with in_eval_mode(model):
            for input_ids in batches.split(8) if isinstance(batches, Tensor) else batches:
                model(input_ids.to(device))
                tokens += input_ids.numel()
    finally:
        for hook in hooks:
            hook.remove()
    directions = {}
    for name, layer in layers.items():
        r, features = ranks[name], layer.in_features
        if r > min(tokens, features):
            raise ValueError(f"{tokens} tokens of {features} features cannot give r={r} directions for {name}")
        vectors = torch.linalg.eigh(sums[name]).eigenvectors  # by columns, in ascending order
        directions[name] = vectors[:, -r:].T.flip(0)
    return directions


def check_start(start: bool | str, name: str, layer: nn.Module, r: int):
    """Raises ValueError for a start from W of a layer that is not in floats, and for an r above its full rank."""
    if start not in STARTS_FROM_WEIGHT:
        return
    if type(layer) is not nn.Linear:
        found = f"{name} is a {type(layer).__name__}; quantize_model after such a start, or apply_loftq"
        raise ValueError(f"init_lora_weights {start!r} starts from W in floats, and {found}")
    if r > (full := min(layer.weight.shape)):
        raise ValueError(f"init_lora_weights {start!r} cannot give r={r} directions of {name}, which has {full}")


@torch.no_grad()
def start_layer(layer: LoRALinear, start: bool | str, directions: Tensor | None = None):
    """Gives A and B of a new layer their first values. directions (r, in): for "eva", see `eva_directions`."""
    if start == "gaussian":
        nn.init.normal_(layer.lora_A, std=1 / layer.r)
    elif start == "eva":
        assert directions is not None, "eva starts from directions"
        layer.lora_A.copy_(directions)
    elif start in STARTS_FROM_WEIGHT:
        W = layer.base_layer.weight.detach().to(layer.lora_A.dtype)
        A, B = STARTS_FROM_WEIGHT[str(start)](W, layer.r, layer.scaling)
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
        layer.start_A, layer.start_B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
