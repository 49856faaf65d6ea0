"""An adapter merged into its base for good, with the difference that this makes to the logits.

On a float base merging is exact but for the last digits. On a base in 4 bits it is not: W + ΔW lies on none of the
sixteen levels, and an update is mostly smaller than the step between two of them. Rounding again would lose much of the
training. So the update is added to the dequantized weight, and floats are written, eight times as large in float32; the
report says how much rounding again would have cost. To stay in 4 bits, keep the adapter apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minilora.adapters.inject import merge_lora
from minilora.linear4bit import dequantize_model, quantize_model
from minilora.model import GPT
from minilora.storage.models import save_model
from minilora.storage.peft import quantization_of


@dataclass
class MergeReport:
    """Largest absolute differences between logits, over the same random tokens."""

    largest_logit: float
    merged: float  # between merged, as written, and base and adapter kept apart
    rounded: float | None  # the same, had the merged weights been rounded to 4 bits again; None for a float base

    def text(self) -> str:
        apart = f"largest logit difference to base and adapter kept apart: {self.merged:.2g}"
        lines = [f"{apart} (the largest logit is {self.largest_logit:.3g})"]
        if self.rounded is not None:
            lines += [
                f"with the merged weights rounded to 4 bits again: {self.rounded:.2g}",
                "Merging into 4 bits is not lossless. So the update was added to the dequantized weights, and they are",
                "written as floats. To stay in 4 bits, keep the adapter apart (generate --adapter).",
            ]
        return "\n".join(lines)


@torch.no_grad()
def random_logits(model: GPT) -> Tensor:
    """Logits for 4 rows of at most 64 random tokens, the same at every call, in float32."""
    generator = torch.Generator().manual_seed(0)
    length = min(64, model.config.max_position_embeddings)
    ids = torch.randint(model.config.vocab_size, (4, length), generator=generator)
    return model(ids.to(model.model.embed_tokens.weight.device)).float()


def merge_adapter(
    model: GPT,
    out: Path,
    dtype: torch.dtype | None = None,
    companions: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Merges the model's LoRA layers, dequantizing first where the base is in 4 bits, and saves it as a plain model.

    dtype: of the weights as they are written; None keeps the model's own. The sum is computed in the model's own, so a
    model in half precision is better loaded in float32.
    companions, overwrite: as in save_model. The model is changed, and fit for nothing afterwards. Raises what
    merge_lora and save_model raise.
    """
    quantization, own = quantization_of(model), model.model.embed_tokens.weight.dtype
    model.eval()
    unmerged = random_logits(model)
    merge_lora(dequantize_model(model))
    model.to(dtype or own)
    save_model(model, out, companions, overwrite)
    merged = random_logits(model.to(own))
    rounded = None
    if quantization:
        quantize_model(model, quantization)
        rounded = (random_logits(model) - unmerged).abs().max().item()
    return MergeReport(unmerged.abs().max().item(), (merged - unmerged).abs().max().item(), rounded)
