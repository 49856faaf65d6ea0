"""A 4-bit layer on disk, in bitsandbytes' layout: these tensors in place of a float checkpoint's one `weight`.

    weight                                 uint8 (n/2, 1)   two codes in each byte
    weight.absmax                          float32 (N,)     the scales, or uint8 under double quantization
    weight.quant_map                       float32 (16,)    the levels by code
    weight.nested_absmax                   float32 (N/256,) \\
    weight.nested_quant_map                float32 (256,)   / under double quantization only
    weight.quant_state.bitsandbytes__nf4   uint8            JSON: scheme, block size, shape and dtype of the weight

for n weights in N blocks. So a quantized Llama checkpoint is read as it stands, and transformers reads ours. int4,
which bitsandbytes does not have, is written the same way under `quant_state.minilora__int4`.

Wrong codes decode to wrong weights and never fail, so everything that can be checked is checked here.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from minilora.dtypes import DTYPES, dtype_name
from minilora.levels import LEVELS, SCALE_LEVELS
from minilora.linear4bit import Linear4bit
from minilora.quant import SCALE_BLOCK, Quantization, QuantizedTensor, stored_shapes
from minilora.storage.files import parse_json, shown

STATE = {"nf4": "quant_state.bitsandbytes__nf4", "fp4": "quant_state.bitsandbytes__fp4"}
STATE["int4"] = "quant_state.minilora__int4"
LARGEST_SCALE = 65504.0  # float16's largest number: no weight of a model is larger


def quantized_parts(names: list[str]) -> dict[str, list[str]]:
    """The layers that these tensors hold in 4 bits, each with the names of its tensors."""
    ends = tuple(f".weight.{state}" for state in STATE.values())
    layers = [name.rpartition(".weight.quant_state.")[0] for name in names if name.endswith(ends)]
    parts: dict[str, list[str]] = {layer: [] for layer in layers}
    for name in names:
        layer, _, rest = name.partition(".weight")
        if layer in parts and (not rest or rest.startswith(".")):
            parts[layer].append(name)
    return parts


def layer_tensors(name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    """A layer's weight as it is written, by full name; the bias is an ordinary tensor and not among them."""
    state: dict[str, object] = {"quant_type": quantized.scheme, "blocksize": quantized.block_size}
    state |= {"dtype": dtype_name(quantized.dtype), "shape": list(quantized.shape)}
    tensors = {
        "weight": quantized.codes[:, None],
        "weight.absmax": quantized.scales,
        "weight.quant_map": LEVELS[quantized.scheme].clone(),  # two names in a file must not share one memory
    }
    if quantized.nested_scales is not None and quantized.nested_offset is not None:
        offset = quantized.nested_offset.item()
        state |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {"weight.nested_absmax": quantized.nested_scales, "weight.nested_quant_map": SCALE_LEVELS.clone()}
    tensors[f"weight.{STATE[quantized.scheme]}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def read_layer(tensors: dict[str, Tensor], shape: tuple[int, ...]) -> QuantizedTensor:
    """The weight of one layer from its tensors, named as above. shape: (out, in), as the model has it.

    Raises ValueError, one sentence without the layer's name, for tensors that are missing or too many, a quant state
    that is not the JSON it should be or is of another shape, levels other than ours, codes or scales of the wrong
    size, codes that no quantization gives, and scales that are not finite, negative or huge.
    """
    (key,) = [key for key in tensors if key.startswith("weight.quant_state.")]
    state = read_state(tensors[key], key, shape)
    nested = "nested_blocksize" in state
    needed = {"weight", "weight.absmax", "weight.quant_map", key}
    if nested:
        needed |= {"weight.nested_absmax", "weight.nested_quant_map"}
    if missing := sorted(needed - tensors.keys()):
        raise ValueError(f"lacks {', '.join(missing)}")
    if extra := sorted(tensors.keys() - needed):
        raise ValueError(f"has {', '.join(extra)}, which its quant state does not mention")
    maps = {"weight.quant_map": LEVELS[state["quant_type"]], "weight.nested_quant_map": SCALE_LEVELS}
    for name in maps.keys() & tensors.keys():
        levels = tensors[name].float().cpu()
        if levels.shape != maps[name].shape or not torch.allclose(levels, maps[name], rtol=0, atol=1e-6):
            raise ValueError(f"has a {name} with other levels than those of {state['quant_type']}")

    scheme, block_size, dtype = state["quant_type"], state["blocksize"], DTYPES[state["dtype"]]
    found = {"codes": tensors["weight"].contiguous().view(-1).view(torch.uint8), "scales": tensors["weight.absmax"]}
    if nested:
        found["nested_scales"] = tensors["weight.nested_absmax"]
        found["nested_offset"] = torch.tensor(state["nested_offset"], device=tensors["weight"].device)
    names = {"codes": "weight", "scales": "weight.absmax", "nested_scales": "weight.nested_absmax"}
    for field, (size, kind) in stored_shapes(math.prod(shape), block_size, nested).items():
        tensor, name = found[field], names.get(field, field)
        if tuple(tensor.shape) != size or tensor.dtype != kind:
            right = f"a weight of shape {tuple(shape)} in blocks of {block_size} needs {math.prod(size)} of {kind}"
            raise ValueError(f"has a {name} of {tensor.numel()} values of {tensor.dtype}, where {right}")
        if not tensor.isfinite().all():
            raise ValueError(f"has a {name} with NaN or infinity in it")
    quantized = QuantizedTensor(scheme=scheme, block_size=block_size, shape=shape, dtype=dtype, **found)
    check_numbers(quantized)
    return quantized


def check_numbers(quantized: QuantizedTensor):
    """Raises ValueError for numbers that no quantization gives. A scale is the absmax of a block, so it is not below 0,
    but for the rounding of a small one to 8 bits: by less than a hundredth of its nested scale."""
    scales, below = quantized.absmax(), 0.0
    if quantized.nested_scales is not None:
        if (least := quantized.nested_scales.min().item()) < 0:
            raise ValueError(f"has a weight.nested_absmax of {least:g}, where a number of at least 0 is expected")
        below = 0.01 * quantized.nested_scales.max().item()
    least, largest = (end.item() for end in scales.aminmax())
    if not (-below <= least and largest <= LARGEST_SCALE):
        found = largest if -below <= least else least
        raise ValueError(f"has a weight.absmax of {found:g}, where numbers from 0 to {LARGEST_SCALE:g} are expected")
    codes = quantized.codes
    if quantized.scheme == "int4" and ((codes < 16) | (codes & 15 == 0)).any():
        raise ValueError("has code 0 in its weight, which int4 does not use (-8 of -7 to 7)")


def read_state(encoded: Tensor, key: str, shape: tuple[int, ...]) -> dict:
    """The JSON of the quant state that is stored under `key`, checked. Raises ValueError as `read_layer` does."""
    if encoded.dtype != torch.uint8 or encoded.ndim != 1:
        raise ValueError(f"has a {key} of {encoded.dtype}, where the bytes of a JSON text are expected")
    try:
        state = parse_json(bytes(encoded.tolist()))
        found = {name: state[name] for name in ("quant_type", "blocksize", "dtype", "shape")}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"has a {key} that is not the JSON it should be: {error!r}") from None
    if key not in [f"weight.{name}" for scheme, name in STATE.items() if scheme == found["quant_type"]]:
        raise ValueError(f"has a {key} that says quant_type {shown(found['quant_type'])}")
    Quantization(found["quant_type"], found["blocksize"])  # raises ValueError for values that we do not have
    if found["dtype"] not in list(DTYPES):  # a list, because the file's value may be one that cannot be hashed
        raise ValueError(f"has dtype {shown(found['dtype'])} in its quant state; known: {', '.join(DTYPES)}")
    if found["shape"] != list(shape):
        right = f"where the config makes it {list(shape)}"
        raise ValueError(f"has shape {shown(found['shape'])} in its quant state, {right}")
    if "nested_blocksize" in state:
        offset = state.get("nested_offset")
        if state["nested_blocksize"] != SCALE_BLOCK or not isinstance(offset, float):
            raise ValueError(f"needs nested_blocksize {SCALE_BLOCK} and a number as nested_offset in its quant state")
    return state


def quantization_settings(layer: Linear4bit, compute_dtype: torch.dtype) -> dict:
    """The quantization_config of a model with such layers, in transformers' words."""
    if layer.quantization.scheme == "int4":
        return {"quant_method": "minilora", "quant_type": "int4"}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": layer.quantization.scheme,
        "bnb_4bit_use_double_quant": layer.quantization.double_quant,
        "bnb_4bit_compute_dtype": dtype_name(compute_dtype),
        "bnb_4bit_quant_storage": "uint8",
    }


def check_quantization(settings, path: Path):
    """Raises ValueError for a quantization_config of another kind than the layout above."""
    settings = settings if isinstance(settings, dict) else {"quant_method": settings}
    method, bits = settings.get("quant_method", "bitsandbytes"), " in 8 bits" if settings.get("load_in_8bit") else ""
    if method not in ("bitsandbytes", "minilora") or bits:
        raise ValueError(
            f"{path} has a quantization_config of {shown(method)}{bits}; only bitsandbytes' 4 bits can be read"
        )
