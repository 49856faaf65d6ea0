"""Exercise 08: LoRA+, a faster learning rate for B."""

import torch
from torch import nn

from minilora.adapters.dora import DoRALinear
from minilora.adapters.variants import loraplus_groups
from minilora.exercises.checking import Draw, Exercise, expect, expect_error, require
from minilora.exercises.layers import lora_layer
from minilora.lora import LoRALinear

EXERCISE = Exercise(
    number=8,
    slug="loraplus",
    title="LoRA+: B learns faster",
    targets=("adapters.variants:loraplus_groups",),
    difficulty=1,
    minutes=20,
    notebook="04_variants",
    section="2. The code of each",
    explanation="""\
A (r, in) takes a wide input down to r numbers, B (out, r) starts at zero and takes r numbers up. With Adam, each number
moves by about the learning rate, whatever its gradient. In a wide layer a step that suits A is then too small for B, by
a factor that grows with the width. LoRA+ (Hayou et al. 2024, arXiv 2402.12354) gives B a rate of its own, `ratio` times
that of A; a ratio of 16 is the default.

A PyTorch optimizer takes a list of parameter groups, `[{"params": [...], "lr": ...}, ...]`. `loraplus_groups` returns
two, the slow one first:

- at `lr`: every A, and whatever else of the model is trained (an unfrozen embedding, say);
- at `ratio * lr`: every B, and DoRA's `lora_magnitude_vector` (out,), which goes with B.

Every parameter with `requires_grad` is in exactly one group, once, also a weight that two modules share. A frozen one,
such as the base's weights or an A that stays as it started, is in none. The model is not changed.

Raise a ValueError that says which (`lr` or `ratio`) is not above 0, and one for a model without LoRA layers.""",
    hints=(
        "lora_layers(model) gives (name, layer) for each LoRALinear; layer.lora_A and layer.lora_B are its parameters. "
        "model.parameters() gives all, each once.",
        "`in` on a list of tensors compares their values and fails on different shapes; a set, or ids, compares "
        "identity. layer.parameters(recurse=False) are A, B and, in a DoRA layer, the magnitude.",
        "fast: of every LoRA layer what is not `layer.lora_A`. slow: of model.parameters() whatever requires a "
        "gradient and is not in set(fast). Refuse bad rates first, then an empty `fast`.",
    ),
    question="With ratio 16, is it the same to multiply the learning rate of B by 16 and to multiply B itself by 16 in "
    "the forward pass? Answer for SGD and for Adam.",
    answer="For SGD it is not: with 16·B in the forward pass the gradient of B is 16 times as large, and each step "
    "of B counts 16 times, so the update moves 256 times as far, where a rate 16 times as large moves it 16 times as "
    "far. For Adam, whose steps do not depend on the gradient's size, B moves as far as before and counts 16 times: "
    "just what the larger rate does. As B starts at zero, 16·B is then at every step what B is under LoRA+, and A's "
    "gradients are the same too. What differs is Adam's ε, and weight decay.",
)


class Tiny(nn.Module):
    """An embedding tied to an output head, a norm, and LoRA layers; all frozen but A and B."""

    def __init__(self, draw: Draw, count: int, kind: type = LoRALinear):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.requires_grad_(False)
        self.blocks = nn.ModuleList(lora_layer(draw, 4, kind=kind) for _ in range(count))
        if kind is DoRALinear:
            for block in self.blocks:
                block.lora_magnitude_vector = nn.Parameter(draw.normal(block.out_features))


def rates(model: nn.Module, groups: list[dict], case: dict) -> dict[str, float]:
    """The learning rate by name of each parameter. Wrong unless every trainable one is there, once, and no other."""
    entries = [(parameter, group["lr"]) for group in groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    require(
        all(id(parameter) in names for parameter, _ in entries),
        "expected the model's own parameters in the groups, got something else",
        case,
        "put the parameters themselves in, not copies and not names",
    )
    found = [names[id(parameter)] for parameter, _ in entries]
    frozen = [name for name in found if not model.get_parameter(name).requires_grad]
    slip = "take only parameters with requires_grad"
    require(not frozen, f"expected no frozen parameter in a group, got {', '.join(frozen)}", case, slip)
    twice = sorted({name for name in found if found.count(name) > 1})
    slip = (
        "every parameter in one group, once: model.parameters() gives a shared weight once, module by module does not"
    )
    require(not twice, f"expected every parameter once, got more than once {', '.join(twice)}", case, slip)
    missing = [name for name, p in model.named_parameters() if p.requires_grad and name not in found]
    slip = "what is in no group does not learn: everything that is trained and not fast belongs to the slow group"
    require(not missing, f"expected every trainable parameter in a group, missing {', '.join(missing)}", case, slip)
    return {names[id(parameter)]: rate for parameter, rate in entries}


def draw_rates(draw: Draw) -> tuple[float, float]:
    return draw.choice((0.0003, 0.001, 0.02)), draw.number(2, 20)


def check_rates(found: list, lr: float, ratio: float, case: dict, second: str, advice: str):
    """`found` are the rates of A and of `second`, which is to learn `ratio` times faster."""
    pair = torch.tensor([lr, lr], dtype=torch.float64)
    slips = {
        f"the wrong way round: A learns at lr, {second} at ratio · lr": [ratio, 1],
        "A learns at ratio · lr as well; its rate is lr": [ratio, ratio],
        f"{second} learns no faster than A{advice}": [1, 1],
        f"{second} learns more slowly: multiply by ratio, do not divide": [1, 1 / ratio],
        f"A is slowed down instead: it learns at lr, and {second} at ratio · lr": [1 / ratio, 1],
        f"{second} is given ratio alone; its rate is ratio · lr": [1, ratio / lr],
        f"{second} is given lr + ratio; its rate is ratio · lr": [1, (lr + ratio) / lr],
    }
    slips = {sentence: pair * torch.tensor(factors).double() for sentence, factors in slips.items()}
    wanted = pair * torch.tensor([1, ratio]).double()
    expect(torch.tensor(found, dtype=torch.float64), wanted, case, slips, f"the rates of A and {second}", 1e-6)


@EXERCISE.property("A learns at lr and B at ratio · lr")
def two_rates(draw: Draw):
    for count in (1, 2):
        model, (lr, ratio) = Tiny(draw, count), draw_rates(draw)
        case = {"lr": lr, "ratio": ratio, "LoRA layers": count}
        found = rates(model, loraplus_groups(model, lr, ratio), case)
        for block in range(count):
            pair = [found[f"blocks.{block}.{name}"] for name in ("lora_A", "lora_B")]
            check_rates(pair, lr, ratio, {**case, "layer": block}, "B", "")


@EXERCISE.property("two groups, the slow one first; a ratio left out is 16")
def two_groups(draw: Draw):
    model, (lr, _) = Tiny(draw, 2), draw_rates(draw)
    case = {"lr": lr, "LoRA layers": 2}
    wanted = torch.tensor([lr, 16 * lr], dtype=torch.float64)
    for settings in ({"ratio": 16}, {}):
        groups = loraplus_groups(model, lr, **settings)
        shape = [len(list(group["params"])) for group in groups]
        slip = "all A's share one group and all B's another"
        require(shape == [2, 2], f"expected two groups of 2 parameters, got groups of {shape}", case, slip)
        found = torch.tensor([group["lr"] for group in groups], dtype=torch.float64)
        slips = {"the slow group comes first": wanted.flip(0)}
        if not settings:
            slips["the default of ratio is 16"] = found  # with 16 given it was right
        expect(found, wanted, {**case, **settings}, slips, "the rates of the groups", 1e-6)


@EXERCISE.property("whatever else is trained learns at lr: every trainable parameter is in one group, once")
def all_trainable(draw: Draw):
    for tied in (False, True):
        model, (lr, ratio) = Tiny(draw, 2), draw_rates(draw)
        model.norm.requires_grad_(True)
        model.embed.requires_grad_(tied)  # which is the head's weight too
        model.blocks[0].base_layer.bias.requires_grad_(True)
        case = {"lr": lr, "ratio": ratio, "trained besides": "norm, a bias" + ", embed (tied to head)" * tied}
        found = rates(model, loraplus_groups(model, lr, ratio), case)
        for name, rate in found.items():
            if not name.endswith(("lora_A", "lora_B")):
                slip = "only B and the magnitude are fast, not everything that is not A"
                pair = torch.tensor(float(rate)), torch.tensor(lr)
                expect(*pair, case, {slip: ratio * pair[1]}, f"the rate of {name}", 1e-6)


@EXERCISE.property("DoRA's magnitude learns with B")
def magnitude(draw: Draw):
    model, (lr, ratio) = Tiny(draw, 1, DoRALinear), draw_rates(draw)
    case = {"lr": lr, "ratio": ratio, "layer": "DoRALinear"}
    found = rates(model, loraplus_groups(model, lr, ratio), case)
    pair = [found[f"blocks.0.{name}"] for name in ("lora_A", "lora_magnitude_vector")]
    check_rates(pair, lr, ratio, case, "the magnitude", "; lora_magnitude_vector goes with B")


@EXERCISE.property("what is frozen is in no group, also an A that stays as it started; the model is as before")
def frozen(draw: Draw):
    model, (lr, ratio) = Tiny(draw, 2), draw_rates(draw)
    for block in model.blocks:
        block.lora_A.requires_grad_(False)  # LoRA-FA
    before = {name: (p.requires_grad, p.tolist()) for name, p in model.named_parameters()}
    case = {"lr": lr, "ratio": ratio, "frozen": "all but B"}
    rates(model, loraplus_groups(model, lr, ratio), case)
    after = {name: (p.requires_grad, p.tolist()) for name, p in model.named_parameters()}
    changed = [name for name in before if before[name] != after[name]]
    slip = "loraplus_groups only sorts the parameters; what is trained was decided before"
    require(not changed, f"expected the model to be as before, changed: {', '.join(changed)}", case, slip)


@EXERCISE.property("an optimizer takes the groups: for equal gradients B moves ratio times as far as A")
def one_step(draw: Draw):
    model, (lr, ratio) = Tiny(draw, 2), draw_rates(draw)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(loraplus_groups(model, lr, ratio), lr=1.0)  # a rate for groups that name none
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = lr if name.endswith("lora_A") else ratio * lr if name.endswith("lora_B") else 0
        moved = (before[name] - parameter.detach()).mean().item()
        slips = {"the group has no rate of its own: its key is 'lr'": 1.0, "it did not move": 0.0}
        slips = {sentence: torch.tensor(step) for sentence, step in slips.items()}
        case = {"lr": lr, "ratio": ratio}
        expect(torch.tensor(moved), torch.tensor(float(rate)), case, slips, f"the step of {name}", 1e-6)


@EXERCISE.property("refused: lr or ratio not above 0, by name, and a model without LoRA layers")
def refused(draw: Draw):
    model = Tiny(draw, 1)
    for name in ("lr", "ratio"):
        for value in (0, -0.5):
            case = {"lr": 0.001, "ratio": 16, name: value}
            slip = f"{name} must be above 0; 0 and negative numbers are refused"
            expect_error(lambda case=case: loraplus_groups(model, **case), (name,), case, slip)
    plain = Tiny(draw, 0)
    plain.norm.requires_grad_(True)
    slip = "without LoRA layers there is no B, and all would learn at lr without a word"
    expect_error(lambda: loraplus_groups(plain, 0.001), (), {"model": "no LoRA layers"}, slip)
