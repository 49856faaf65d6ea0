"""Exercise 13: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "quant": """
import dataclasses


def quantize_scales(quantized):
    mean = quantized.scales.sum() / len(quantized.scales)
    codes, largest = [], []
    for block in (quantized.scales - mean).split(256):
        top = block.abs().max()
        if top == 0:
            top = torch.tensor(1e-30)
        distances = (block[:, None] / top - SCALE_LEVELS).abs()
        codes.append(distances.argmin(dim=1))
        largest.append(top)
    codes = torch.cat(codes).to(torch.uint8)
    return dataclasses.replace(quantized, scales=codes, nested_scales=torch.stack(largest), nested_offset=mean)


class QuantizedTensor:
    def absmax(self):
        if self.nested_offset is None:
            return self.scales
        level = SCALE_LEVELS[self.scales.long()]
        blocks = [part * top for part, top in zip(level.split(256), self.nested_scales)]
        return torch.cat(blocks) + self.nested_offset
"""
}

MUTANTS = [
    Mutant("plain scales forgotten", "if self.nested_offset is None", "if False", "TypeError"),
    Mutant(
        "offset not added", "torch.cat(blocks) + self.nested_offset", "torch.cat(blocks)", "the offset is not added"
    ),
    Mutant(
        "offset scaled", (" + self.nested_offset", "part * top"), ("", "(part + self.nested_offset) * top"), "is scaled"
    ),
    Mutant("offset taken off twice", "(blocks) +", "(blocks) -", "taken off a second time"),
    Mutant("nested scales missing", "part * top", "part", "the nested scales are missing"),
    Mutant(
        "back: first nested scale for all",
        "part * top",
        "part * self.nested_scales[0]",
        "the first nested scale serves",
    ),
    Mutant(
        "nested scales take turns",
        "torch.cat(blocks) + self.nested_offset",
        "level * self.nested_scales.repeat(256)[: len(level)] + self.nested_offset",
        "take turns",
    ),
    Mutant("codes taken for levels", "SCALE_LEVELS[self.scales.long()]", "self.scales.float()", "look it up"),
    Mutant("back: float64", "return torch.cat(blocks)", "return torch.cat(blocks).double()", "expected float32"),
    Mutant("mean not taken off", "(quantized.scales - mean)", "quantized.scales", "the mean is not taken off before"),
    Mutant("no mean at all", "quantized.scales.sum() / len(quantized.scales)", "torch.zeros(())", "the offset is 0"),
    Mutant("median", "quantized.scales.sum() / len(quantized.scales)", "quantized.scales.median()", "the median"),
    Mutant("offset of shape (1,)", "nested_offset=mean)", "nested_offset=mean[None])", "the offset has a dimension"),
    Mutant("one scale for all", ".split(256):", ".split(10**6):", "one nested scale serves all"),
    Mutant(
        "last block left out",
        "(quantized.scales - mean).split(256):",
        "(quantized.scales - mean).split(256)[: max(1, len(quantized.scales) // 256)]:",
        "the last block is short",
    ),
    Mutant("largest, not largest magnitude", "block.abs().max()", "block.max()", "not the largest magnitude"),
    Mutant("blocks of 16", ".split(256):", ".split(quantized.block_size):", "of the weight's block size"),
    Mutant("inverse stored", "largest.append(top)", "largest.append(1 / top)", "the inverse is stored"),
    Mutant("codes of int64", ".to(torch.uint8)", "", "one byte each"),
    Mutant("not divided", "block[:, None] / top", "block[:, None]", "is not divided by"),
    Mutant(
        "evenly spaced",
        "distances.argmin(dim=1)",
        "((block / top + 1) * 127.5).round()",
        "as if the levels were evenly spaced",
    ),
    Mutant(
        "level below",
        "distances.argmin(dim=1)",
        "(SCALE_LEVELS <= block[:, None] / top).sum(1) - 1",
        "you take the level below",
    ),
    Mutant(
        "changed in place",
        "dataclasses.replace(quantized, scales=codes, nested_scales=torch.stack(largest), nested_offset=mean)",
        "_set(quantized, codes, torch.stack(largest), mean)\n\n\n"
        "def _set(quantized, scales, nested_scales, nested_offset):\n"
        "    quantized.scales, quantized.nested_scales = scales, nested_scales\n"
        "    quantized.nested_offset = nested_offset\n"
        "    return quantized",
        "you change the QuantizedTensor",
    ),
    Mutant("subtracted in place", "(quantized.scales - mean)", "quantized.scales.sub_(mean)", "you change the Quant"),
    Mutant(
        "scheme not carried on", "quantized, scales=codes", "quantized, scheme='nf4', scales=codes", "scheme: expected"
    ),
]
