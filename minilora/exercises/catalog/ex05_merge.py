"""Exercise 05: adding a LoRA update to the weight, and taking it out again."""

import torch
from torch import Tensor, nn

from minilora.exercises.checking import SIZES, Draw, Exercise, expect, expect_error, require
from minilora.exercises.layers import assemble, lora_layer, written_out
from minilora.lora import LoRALinear

EXERCISE = Exercise(
    number=5,
    slug="merge",
    title="Merging and taking it out again",
    targets=("lora:LoRALinear.delta_weight", "lora:LoRALinear.merge", "lora:LoRALinear.unmerge"),
    changes=("lora:LoRALinear.merge", "lora:LoRALinear.unmerge"),
    difficulty=2,
    minutes=25,
    notebook="01_lora_from_scratch",
    section="5. Merging",
    explanation="""\
W x + b + s·B(A x) is (W + s·BA) x + b. So a trained update can be added to the weight, once, and the model then costs
what the base costs.

`delta_weight()` gives ΔW = s·BA, (out, in): s is the layer's `scaling`, A (r, in) and B (out, r) are those of
`self.factors()`, mostly `lora_A` and `lora_B`. A and B in half precision are multiplied in float32 or wider, and the
result stays as wide.

`merge` adds `self.delta_weight()` to `base_layer.weight`; a variant such as DoRA has a `delta_weight` of its own.
Before, it keeps a copy of W in `original_weight`, and `self.merged` is True as long as there is one: a second merge
changes nothing. A bfloat16 weight has 8 binary digits, so add in float32 and round once. A base that is no `nn.Linear`
is refused with a ValueError that names its type, and nothing is changed.

`unmerge` puts the copied weight back, bit for bit, and sets `original_weight` to None. Subtracting would not do:
W + ΔW was rounded, and what it lost is gone. On a layer that is not merged it does nothing.

The weight stays the same frozen parameter throughout; only its numbers change, and no gradient is recorded.""",
    hints=(
        "delta_weight: torch.promote_types(A.dtype, torch.float32) says how wide, then scaling times B @ A. "
        "Changing a parameter's numbers needs `with torch.no_grad()` and `copy_`.",
        "PyTorch adds a bfloat16 and a float32 tensor in float32, and `weight.copy_(wide)` rounds to the weight's own "
        "type. `+=` on the weight would do the same; `delta.to(weight.dtype)` before adding rounds twice.",
        "merge: return if self.merged; raise ValueError unless isinstance(self.base_layer, nn.Linear); original_weight "
        "becomes weight.detach().clone(); copy weight + self.delta_weight() into the weight. unmerge: if merged, copy "
        "original_weight back and set it to None.",
    ),
    question="An adapter is merged, swapped for another and swapped back a hundred times. Why does subtracting ΔW harm "
    "a bfloat16 model more than a float32 one, and what does keeping a copy of W cost instead?",
    answer="Each merge rounds W + ΔW, and subtracting ΔW does not bring back what was rounded off, so the errors of "
    "a hundred swaps add up. bfloat16 has 8 binary digits and rounds by up to 1/512 of a weight each time, float32 "
    "has 24 and rounds by 1/33,000,000: after a hundred swaps the one may be off by percents, the other still by "
    "nothing that shows. The copy costs as many bytes as the merged weights, for as long as they are merged.",
)


class Variant(LoRALinear):
    """A layer whose ΔW is its own, as DoRA's is."""

    def delta_weight(self) -> Tensor:
        return self.own.clone()  # whoever adds to it in place shall not change what is expected


class NotLinear(nn.Module):
    """Has a weight, and is no nn.Linear: adding to such a weight may mean nothing (codes of 4 bits, for one)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight)


def change(layer: LoRALinear, scaling: float | None = None) -> Tensor:
    """s·BA, (out, in)."""
    scaling = layer.scaling if scaling is None else scaling
    return scaling * torch.einsum("or,ri->oi", layer.lora_B.detach(), layer.lora_A.detach())


def short(draw: Draw, *shape: int, digits: int = 6) -> Tensor:
    """Random whole numbers of so many binary digits, over 64: sums of their products are exact in float32."""
    most = 2**digits
    return (draw.normal(*shape) * most / 3).round().clamp(1 - most, most - 1) / 64


def started(draw: Draw, layer: LoRALinear) -> Tensor:
    """Gives the layer a start from W, as PiSSA does: s·B₀A₀, which its factors take off."""
    layer.start_A, layer.start_B = draw.normal(*layer.lora_A.shape), draw.normal(*layer.lora_B.shape)
    return layer.scaling * torch.einsum("or,ri->oi", layer.start_B, layer.start_A)


@EXERCISE.property("delta_weight: s·BA, (out, in), and A and B stay as they are")
def delta_weight(draw: Draw):
    for most in SIZES:
        for square in (True, False):
            d, r = draw.integer(2, most), draw.integer(2, most)
            base = nn.Linear(d, d if square else draw.integer(1, most)).double()
            layer = assemble(draw, base, r, draw.integer(r + 1, r + 12))
            layer.scaling = layer.lora_alpha / r**0.5  # as with rsLoRA: the layer knows its scaling
            A, B, s = layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling
            before, wanted = (A.clone(), B.clone()), change(layer)
            case = {"A": A, "B": B, "scaling": s}
            slips = {
                "the scaling is missing: it is self.scaling": wanted / s,
                "alpha / r is not this layer's scaling: use self.scaling, which knows of rsLoRA": wanted
                * (layer.lora_alpha / r / s),
                "the scaling acts twice": wanted * s,
                "that is (BA) transposed": wanted.T,
                "that is A @ B; the product is B @ A": lambda A=A, B=B, s=s: s * A @ B if len(B) == A.shape[1] else 0,
            }
            expect(layer.delta_weight(), wanted, case, slips, "delta_weight()")
            kept = A.equal(before[0]) and B.equal(before[1])
            require(kept, "delta_weight changed A or B", case, "an operation in place, such as B *= s")


@EXERCISE.property("delta_weight: after a start from W, s·(BA - B₀A₀), by way of factors()")
def delta_weight_of_factors(draw: Draw):
    for most in SIZES:
        layer = lora_layer(draw, most, r=draw.integer(2, most))
        BA, start = change(layer), started(draw, layer)
        slips = {
            "that is lora_B times lora_A; what they began as has to be taken off: self.factors()": BA,
            "the start is added; self.factors() takes it off": BA + start,
        }
        case = {"s·BA": BA, "s·B₀A₀": start}
        expect(layer.delta_weight(), BA - start, case, slips, "delta_weight()")


@EXERCISE.property("delta_weight: half-precision A and B are multiplied in float32 at least")
def delta_weight_is_wide(draw: Draw):
    for most in (3, 12):
        layer = lora_layer(draw, most, r=3)
        layer.scaling = 0.5
        A, B = short(draw, 3, most).bfloat16(), short(draw, most, 3).bfloat16()
        layer.lora_A.data, layer.lora_B.data = A, B
        found, case = layer.delta_weight(), {"A": A, "B": B, "scaling": 0.5}
        slip = "widen A and B before they are multiplied, to torch.promote_types(A.dtype, torch.float32)"
        wide = found.dtype in (torch.float32, torch.float64)
        require(wide, f"expected ΔW in float32 at least, got {found.dtype}", case, slip)
        slip = "widened too late: the product was rounded to bfloat16 already"
        expect(found, 0.5 * B.double() @ A.double(), case, {slip: 0.5 * (B @ A).double()}, "delta_weight()")
        layer.lora_A.data, layer.lora_B.data = A.double(), B.double()
        wide = layer.delta_weight().dtype
        slip = "float64 was narrowed: widen to torch.promote_types(A.dtype, torch.float32)"
        require(wide == torch.float64, f"expected ΔW in float64 for A and B in float64, got {wide}", case, slip)


@EXERCISE.property("merge: the weight becomes W + s·BA; bias, A and B stay")
def merge(draw: Draw):
    for most in SIZES:
        layer = lora_layer(draw, most, r=draw.integer(2, most))
        W, U, x = layer.base_layer.weight.detach().clone(), change(layer), draw.normal(3, layer.in_features)
        bias, A, B = (p.detach().clone() for p in (layer.base_layer.bias, layer.lora_A, layer.lora_B))
        case = {"W": W, "A": A, "B": B, "scaling": layer.scaling}
        layer.merge()
        slips = {
            "nothing was added": W,
            "the update alone is left: it is added to W": U,
            "added without the scaling": W + change(layer, 1),
            "the update was subtracted": W - U,
            "the update was added twice": W + 2 * U,
        }
        expect(layer.base_layer.weight, W + U, case, slips, "the merged weight")
        for name, now, then in (("bias", layer.base_layer.bias, bias), ("A", layer.lora_A, A), ("B", layer.lora_B, B)):
            expect(now, then, case, what=f"{name} after merge", tolerance=0)
        expect(
            layer.base_layer(x), written_out(x, W, bias, A, B, layer.scaling), case, what="the merged layer's output"
        )
        slip = "keep the W from before in self.original_weight; self.merged looks for it"
        require(layer.merged, "expected merged to be True after merge", case, slip)
        slip = "original_weight is the weight itself, so it changed with it: keep a clone"
        expect(layer.original_weight, W, case, {slip: W + U}, "original_weight", 0)


@EXERCISE.property("merge: what is added is self.delta_weight(), also where a variant or a start has its own")
def merge_delta_weight(draw: Draw):
    for most in SIZES:
        layer = lora_layer(draw, most, r=draw.integer(2, most), kind=Variant)
        W = layer.base_layer.weight.detach().clone()
        layer.own = draw.normal(layer.out_features, layer.in_features)
        case = {"W": W, "self.delta_weight()": layer.own}
        layer.merge()
        slip = "that is s·BA; merge adds self.delta_weight(), which DoRA and others compute in their own way"
        expect(layer.base_layer.weight, W + layer.own, case, {slip: W + change(layer)}, "the merged weight")

        layer = lora_layer(draw, most, r=draw.integer(2, most))
        W, BA, start = layer.base_layer.weight.detach().clone(), change(layer), started(draw, layer)
        layer.merge()
        slip = "that is all of s·BA; of W the layer changes s·(BA - B₀A₀), which is self.delta_weight()"
        case = {"W": W, "s·BA": BA, "s·B₀A₀ at the start": start}
        expect(layer.base_layer.weight, W + BA - start, case, {slip: W + BA}, "the merged weight")


@EXERCISE.property("merge: a bfloat16 weight is added to in float32 and rounded once")
def rounded_once(draw: Draw):
    for most in (3, 16):
        base = nn.Linear(most, most)
        base.weight.data = (draw.normal(most, most) * 40).round().clamp(-255, 255).bfloat16() / 128
        layer = assemble(draw, base, 3, 1.5)  # s = 0.5
        layer.lora_A.data, layer.lora_B.data = short(draw, 3, most).float(), short(draw, most, 3).float()
        W, U = base.weight.detach().clone(), change(layer).double()
        case = {"W": W, "s·BA": U}
        layer.merge()
        dtype = base.weight.dtype
        require(dtype == torch.bfloat16, f"expected the weight to stay in bfloat16, it is in {dtype}", case)
        slips = {
            "s·BA was rounded to bfloat16 before it was added, by itself or in A and B, and the sum again: add in "
            "float32": (W + U.bfloat16()),
        }
        expect(base.weight, (W.double() + U).bfloat16(), case, slips, "the merged weight", 0)


@EXERCISE.property("merge: merging twice adds once")
def merge_twice(draw: Draw):
    for most in SIZES:
        layer = lora_layer(draw, most, r=draw.integer(2, most))
        W, U = layer.base_layer.weight.detach().clone(), change(layer)
        for _ in range(2):
            layer.merge()
        slip = "the second merge added the update again: return at once if self.merged"
        case = {"W": W, "s·BA": U}
        expect(layer.base_layer.weight, W + U, case, {slip: W + 2 * U}, "the weight after two merges")
        slip = "the second merge took the merged weight for the one from before"
        expect(layer.original_weight, W, case, {slip: W + U}, "original_weight after two merges", 0)


@EXERCISE.property("unmerge: the very bits of W, also when A and B have changed; where nothing is merged, nothing")
def unmerge(draw: Draw):
    for most in SIZES:
        for dtype in (torch.bfloat16, torch.float64):
            layer = lora_layer(draw, most, r=draw.integer(2, most))
            base = layer.base_layer.to(dtype)
            W, U = base.weight.detach().clone(), change(layer)
            layer.unmerge()  # not merged: nothing to do
            expect(base.weight, W, {"W": W}, what="the weight after unmerge without merge", tolerance=0)
            for turn in (1, 2):
                layer.merge()
                merged = base.weight.detach().clone()
                if turn == 2:
                    layer.lora_A.data, layer.lora_B.data = 2 * layer.lora_A.data, -layer.lora_B.data
                layer.unmerge()
                case = {"W": W, "s·BA": U, "dtype": dtype, "A and B changed while merged": turn == 2}
                slips = {
                    "the merged weight is still there: is original_weight a clone, and do you copy it back?": merged,
                    "subtracting ΔW does not give W, for W + ΔW was rounded: put original_weight back": (
                        merged - change(layer)
                    ).to(dtype),
                    "ΔW was rounded and subtracted, which is not W again: put original_weight back": (
                        merged - change(layer).to(dtype)
                    ),
                }
                expect(base.weight, W, case, slips, f"the weight after unmerge number {turn}", 0)
                slip = "set original_weight to None: self.merged looks for it"
                require(not layer.merged, "expected merged to be False after unmerge", case, slip)
                layer.unmerge()
                expect(base.weight, W, case, what="the weight after a second unmerge", tolerance=0)


@EXERCISE.property("merge and unmerge: the weight stays the same frozen parameter, without a gradient recorded")
def same_parameter(draw: Draw):
    layer = lora_layer(draw, 4, r=2)
    weight, case = layer.base_layer.weight, {"in": layer.in_features, "out": layer.out_features}
    for name, action in (("merge", layer.merge), ("unmerge", layer.unmerge)):
        action()
        now = layer.base_layer.weight
        slip = "the sum records how it came from A and B: do it under torch.no_grad()"
        require(
            now.is_leaf, f"expected no gradient to be recorded, but the weight after {name} has a graph", case, slip
        )
        slip = "an nn.Parameter requires gradients from birth; change the numbers of the old one with copy_"
        require(not now.requires_grad, f"expected the weight to be frozen after {name}", case, slip)
        slip = "others hold the old parameter; change its numbers with copy_"
        require(now is weight, f"expected the same parameter after {name}, got a new one", case, slip)
        trained = layer.lora_A.requires_grad and layer.lora_B.requires_grad
        require(trained, f"expected A and B to be trainable after {name} as before", case)


@EXERCISE.property("merge: a base that is no nn.Linear is refused by type, and nothing changes")
def refused(draw: Draw):
    W = draw.normal(3, 2)
    layer = assemble(draw, NotLinear(W.clone()), 2, 4)
    case = {"type(base_layer)": "NotLinear"}
    slip = "only an nn.Linear's weight can be added to: isinstance(self.base_layer, nn.Linear), and type(...).__name__"
    expect_error(layer.merge, ("NotLinear",), case, slip)
    expect(layer.base_layer.weight, W, case, what="the weight after the refusal", tolerance=0)
    slip = "refuse before original_weight is set"
    require(not layer.merged, "expected merged to be False after the refusal", case, slip)
