"""Exercise 11: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "levels": """
def int4_levels():
    return torch.tensor([(code - 8) / 7 for code in range(16)])


def int4_codes(scaled):
    steps = torch.round(7 * scaled)
    return (steps + 8).to(torch.uint8)


def pack_codes(codes):
    pairs = codes.view(-1, 2)
    return pairs[:, 0] * 16 + pairs[:, 1]


def unpack_codes(packed):
    codes = packed.new_empty(2 * len(packed))
    codes[0::2] = packed // 16
    codes[1::2] = packed % 16
    return codes
""",
    "quant": """
def scale_to_unit(flat, block_size):
    n = len(flat)
    missing = -n % block_size
    rows = F.pad(flat.float(), (0, missing)).reshape(-1, block_size)
    absmax = rows.abs().max(dim=1).values
    divisor = torch.where(absmax == 0, torch.ones_like(absmax), absmax)
    return (rows / divisor.unsqueeze(1)).reshape(-1)[:n], absmax


def quantize(weight, scheme="nf4", block_size=64, double_quant=False):
    Quantization(scheme=scheme, block_size=block_size)
    if weight.numel() == 0 or not torch.is_floating_point(weight):
        raise ValueError("expected a floating-point weight that is not empty")
    flat = weight.detach().flatten()
    if not flat.isfinite().all():
        raise ValueError("the weight holds NaN or infinity")
    unit, scales = scale_to_unit(flat, block_size)
    if len(unit) % 2:
        unit = torch.cat([unit, unit.new_zeros(1)])
    q = QuantizedTensor(pack_codes(encode(unit, scheme)), scales, scheme, block_size, tuple(weight.shape), weight.dtype)
    if double_quant:
        q = quantize_scales(q)
    return q
""",
}

MUTANTS = [
    Mutant("levels over 8", "(code - 8) / 7 for", "(code - 8) / 8 for", "divide by 7 and not by 8"),
    Mutant("levels without zero", "(code - 8) / 7 for", "(code - 7.5) / 7.5 for", "zero must be a level"),
    Mutant("levels without offset", "(code - 8) / 7 for", "code / 7 for", "the offset is missing"),
    Mutant("codes cut off", "torch.round(7 * scaled)", "torch.trunc(7 * scaled)", "cut the digits off"),
    Mutant("codes rounded down", "torch.round(7 * scaled)", "torch.floor(7 * scaled)", "and not down"),
    Mutant("codes in eighths", "torch.round(7 * scaled)", "torch.round(8 * scaled)", "not eighths"),
    Mutant("codes without offset", "(steps + 8)", "steps", "code 8 is zero"),
    Mutant("halves up", "torch.round(7 * scaled)", "torch.floor(7 * scaled + 0.5)", "rounds halves up"),
    Mutant("codes as floats", "(steps + 8).to(torch.uint8)", "steps + 8", "expected numbers of type torch.uint8"),
    Mutant("codes as int64", "(steps + 8).to(torch.uint8)", "(steps + 8).long()", "expected codes in uint8"),
    Mutant(
        "low half first", "pairs[:, 0] * 16 + pairs[:, 1]", "pairs[:, 1] * 16 + pairs[:, 0]", "the halves are swapped"
    ),
    Mutant("first with second half", "codes.view(-1, 2)", "codes.view(2, -1).T", "neighbours share a byte"),
    Mutant("no shift", "pairs[:, 0] * 16 +", "pairs[:, 0] |", "<< 4"),
    Mutant(
        "unpack_codes: low half first",
        "packed // 16\n    codes[1::2] = packed % 16",
        "packed % 16\n    codes[1::2] = packed // 16",
        "the high half is the first code",
    ),
    Mutant(
        "unpack_codes: halves apart",
        "return codes\n",
        "return torch.cat([packed // 16, packed % 16])\n",
        "one beside the other",
    ),
    Mutant("unpack_codes: no mask", "packed % 16", "packed", "& 15"),
    Mutant("unpack_codes: no shift", "packed // 16", "packed - packed % 16", ">> 4"),
    Mutant("unpack_codes: to uint8", "return codes\n", "return codes.to(torch.uint8)\n", "the dtype it was given"),
    Mutant("no abs", "rows.abs().max", "rows.max", "take abs()"),
    Mutant("one scale", "rows.abs().max(dim=1).values", "rows.abs().max().expand(len(rows))", "a scale of its own"),
    Mutant("short block left out", ("(rows / ", "[:n]"), ("(rows[: n // block_size] / ", ""), "RuntimeError"),
    Mutant("filling not cut off", "[:n]", "", "must be cut off again"),
    Mutant("rows", ".reshape(-1)[:n], absmax", ", absmax", "flat again"),
    Mutant("norm", "rows.abs().max(dim=1).values", "rows.norm(dim=1)", "largest magnitude is asked for"),
    Mutant("0 / 0", "torch.where(absmax == 0, torch.ones_like(absmax), absmax)", "absmax", "0 / 0"),
    Mutant("scales in a column", "[:n], absmax", "[:n], absmax[:, None]", "not a column"),
    Mutant("bfloat16 stays", "F.pad(flat.float(), ", "F.pad(flat, ", "float32"),
    Mutant("in place", "    n = len(flat)", "    flat /= 2\n    n = len(flat)", "flat was changed in place"),
    Mutant("odd end lost", "unit = torch.cat([unit, unit.new_zeros(1)])", "unit = unit[:-1]", "a byte of its own"),
    Mutant("not packed", "pack_codes(encode(unit, scheme))", "encode(unit, scheme)", "two codes in each byte"),
    Mutant("not scaled", "encode(unit, scheme)", "encode(flat.float(), scheme)", "codes are wrong"),
    Mutant("always int4", "encode(unit, scheme)", "((7 * unit).round() + 8).to(torch.uint8)", "those are int4's codes"),
    Mutant("view", "weight.detach().flatten()", "weight.detach().view(-1)", "RuntimeError"),
    Mutant("shape of flat", "tuple(weight.shape)", "tuple(flat.shape)", "the field shape"),
    Mutant("dtype of scales", "weight.dtype)", "scales.dtype)", "the field dtype"),
    Mutant("with gradient", "weight.detach().flatten()", "weight.flatten()", "weight.detach()"),
    Mutant("NaN accepted", "not flat.isfinite().all()", "False", "no finite absmax"),
    Mutant("only NaN refused", "not flat.isfinite().all()", "flat.isnan().any()", "no finite absmax"),
    Mutant("integers accepted", " or not torch.is_floating_point(weight)", "", "is_floating_point"),
    Mutant(
        "settings unchecked", "Quantization(scheme=scheme, block_size=block_size)", "pass", "Quantization(scheme, block"
    ),
    Mutant("double_quant ignored", "if double_quant:", "if False:", "double_quant is ignored"),
]
