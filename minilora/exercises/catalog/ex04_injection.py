"""Exercise 04: from one layer to a model, by the names of its layers."""

import re
import warnings

import torch
from torch import nn

from minilora.adapters.inject import apply_lora, find_targets
from minilora.config import LoRAConfig
from minilora.exercises.checking import SIZES, Draw, Exercise, expect, expect_error, require
from minilora.exercises.layers import assemble
from minilora.linear4bit import Linear4bit
from minilora.lora import LoRALinear

EXERCISE = Exercise(
    number=4,
    slug="injection",
    title="Put LoRA into a model by name",
    targets=("adapters.inject:find_targets", "adapters.inject:apply_lora"),
    changes=("adapters.inject:apply_lora",),
    difficulty=2,
    minutes=35,
    notebook="01_lora_from_scratch",
    section="2. Into a model",
    explanation="""\
A model is not rewritten for LoRA: some of its linear layers are replaced by a `LoRALinear` around them. Which ones,
`target_modules` says, by PEFT's rules.

`find_targets(names, targets)` gives the chosen names, once each, in the order of `names`:

- a list holds whole names or ends that begin after a dot: "proj" means "mlp.proj", and not "mlp.up_proj"
- one string is a regular expression that must match the whole name
- "all-linear" is every name but the output head, whose last part is `lm_head`

A list entry or an expression that matches nothing, an empty list and a broken expression are a ValueError that names
them. A typo must not pass unnoticed because other entries match.

`apply_lora(model, config, batches)` puts a `LoRALinear` in the place of each target, around the very layer that was
there, notes the config as `model.lora_config`, freezes all but A and B, and returns the model. What `check_targets`
refuses is refused before anything is changed. It warns, naming the layer, where r (by rank_pattern too) exceeds in or
out.

Helpers stand ready: `check_targets(model, config)` finds the names and refuses what must be refused, `linear_layers`
gives the layers by name, in 4 bits too, `layer_rank(config, name)` the r of one layer, `make_layer(layer, name,
config)` the wrapper, `replace_module(model, name, module)` replaces, `train_adapter_only` freezes. Not asked for are
other starts than LoRALinear's own: leave out `config.init_lora_weights` and `batches`, and with them `check_start`,
`eva_directions` and `start_layer`.""",
    hints=(
        "A list entry fits where the name is the entry, or ends with a dot and the entry. For a string, re.fullmatch "
        "is the rule, not re.search or re.match; it raises re.error for a broken expression.",
        "Collect the entries that match no name first, and raise if there are any. Then go through the names, not the "
        "targets: that gives their order and each once. In apply_lora, check first, and change afterwards.",
        "apply_lora: targets = check_targets(model, config); layers = linear_layers(model); for each target "
        "replace_module(model, name, make_layer(layers[name], name, config)), after a warnings.warn if its r is above "
        "min(in, out); then model.lora_config = config, and train_adapter_only(model) last.",
    ),
    question="Why is an entry that matches nothing an error, although the other entries match? What would you notice "
    "in training if it were passed over?",
    answer="An entry without a match is nearly always a typo or the name from another kind of model, and the layers "
    "that were meant stay without an adapter. Nothing fails: the loss falls, with fewer parameters than planned, and "
    "ends a little higher. Whoever does not know the right value sees nothing. At the start an error costs a second; "
    "afterwards it costs a training and a wrong conclusion.",
    spoilers=(
        "hand_made = base.load().requires_grad_(False)",
        "setattr(hand_made.get_submodule(parent), child, HandMadeLoRA(",
    ),
)

KINDS = ("q_proj", "k_proj", "v_proj")


def layer_names(draw: Draw, most: int) -> list[str]:
    """Names as a model has them: some that end in others, one without a dot, and the head last."""
    count = most // 2 + draw.integer(0, 1)
    blocks = [f"layers.{number}.{kind}" for number in range(count) for kind in KINDS]
    return [*blocks, "v_proj.gate", "side.other_v_proj", "side.proj", "proj", "lm_head"]


def ends(names: list[str], *wanted: str) -> list[str]:
    """The names whose last part is one of these."""
    return [name for name in names if name.split(".")[-1] in wanted]


def check(names: list[str], targets: list[str] | str, right: list[str], slips: dict, none: str = ""):
    """Wrong unless `right` is found. none: the slip where it is refused as if it matched nothing."""
    case = {"names": names, "targets": targets}
    try:
        result = find_targets(names, targets)
    except ValueError as error:
        require(False, f"expected {right}, got ValueError: {error}", case, none)
    expect(result, right, case, slips, "found")


@EXERCISE.property("find_targets: a list holds whole names, or ends that begin after a dot")
def suffixes(draw: Draw):
    for most in SIZES:
        names = layer_names(draw, most)
        for end in ("v_proj", "proj"):
            slips = {
                "an end has to begin after a dot: 'proj' is no end of 'q_proj', nor 'v_proj' of 'other_v_proj'": [
                    name for name in names if name.endswith(end)
                ],
                "what stands anywhere in a name is found; it has to be the end of it": [n for n in names if end in n],
                "only whole names are found; an end behind a dot counts as well": [n for n in names if n == end],
                "a whole name is not found; it counts as well as an end": [n for n in names if n.endswith("." + end)],
            }
            check(
                names, [end], ends(names, end), slips, "only whole names are found; an end behind a dot counts as well"
            )
        for target in ("layers.0.k_proj", "0.k_proj"):
            none = "only the last part of a name is compared; an end may have dots in it"
            check(names, [target], ["layers.0.k_proj"], {none: ends(names, "k_proj")}, none)


@EXERCISE.property("find_targets: in the order of the names, each once")
def order(draw: Draw):
    for most in SIZES:
        forwards, targets = layer_names(draw, most), ["v_proj", "q_proj", "layers.0.q_proj"]
        for names in (forwards, forwards[::-1]):
            right, given = ends(names, "q_proj", "v_proj"), (list(names), list(targets))
            by_target = ends(names, "v_proj") + ends(names, "q_proj")
            twice = "a layer that two targets name comes twice"
            slips = {
                f"the order is that of the targets, and {twice}": [*by_target, "layers.0.q_proj"],
                "the order is that of the targets; it should be that of the names": by_target,
                twice: [n for name in right for n in [name] * (1 + (name == "layers.0.q_proj"))],
                "the names are sorted; keep them in the order they come in": sorted(right),
            }
            check(names, targets, right, slips)
            require((names, targets) == given, "the lists that were given have changed", {"targets": targets})


@EXERCISE.property(
    "find_targets: one string is a regular expression for the whole name, or all-linear: all but the head"
)
def expressions(draw: Draw):
    for most in SIZES:
        names = layer_names(draw, most)
        for text, right in (
            ("proj", ["proj"]),
            (r"side|layers\.0\.q_proj", ["layers.0.q_proj"]),  # with $ behind it, side would still match a beginning
            (r".*\.[qv]_proj", ends(names, "q_proj", "v_proj")),
        ):
            slips = {
                "a string is taken for a list entry; it is a regular expression for the whole name": ends(names, text),
                "it matches the beginning of a name; it has to match the whole: re.fullmatch": [
                    name for name in names if re.match(text, name)
                ],
                "it matches anywhere in a name; it has to match the whole: re.fullmatch": [
                    name for name in names if re.search(text, name)
                ],
            }
            check(names, text, right, slips, "a string is a regular expression, and no list of targets or of letters")
        names = [*layer_names(draw, most)[:-1], "lm_head.extra", "decoder.lm_head", "lm_head"]
        slips = {
            "the output head is among them; all-linear leaves it out": names,
            "only the name 'lm_head' is left out; its last part counts, the head may lie deeper": names[:-1],
            "all with lm_head in the name are left out; only the last part counts": names[:-3],
            "all that begin with lm_head are left out; the last part counts": [*names[:-3], "decoder.lm_head"],
        }
        check(names, "all-linear", names[:-2], slips, "'all-linear' is no expression, but a word of its own")


@EXERCISE.property("find_targets: what matches nothing is refused with a ValueError that names it")
def nothing(draw: Draw):
    for most in SIZES:
        names = layer_names(draw, most)
        typo = "each entry has to match; one that does not is a typo, and is named, also beside others that match"
        for targets, absent, slip in (
            (["query"], ["query"], typo),
            (["q_proj", "quary", "v_proj", "dense"], ["quary", "dense"], typo),
            ([], [], "an empty list chooses nothing, and is refused"),
            ("query", ["query"], "an expression that matches no name is refused by name"),
            ("(q_proj", ["(q_proj"], "a broken expression raises re.error; make it a ValueError that names it"),
        ):
            case = {"names": names, "targets": targets}
            try:
                expect_error(lambda t=targets, n=names: find_targets(n, t), tuple(absent), case, slip)
            except re.error as broken:
                require(False, f"expected a ValueError, got re.error: {broken}", case, slip)


def small(draw: Draw, most: int) -> nn.ModuleDict:
    """An embedding, two blocks of a norm and three linear layers, one of them in 4 bits, and a head."""
    d, h, blocks = draw.integer(3, most + 2), draw.integer(3, most + 2), nn.ModuleList()
    for _ in range(2):
        linears = {"q_proj": nn.Linear(d, h), "v_proj": nn.Linear(d, h), "proj": Linear4bit(h, d)}
        blocks.append(nn.ModuleDict({"norm": nn.LayerNorm(d), **linears}))
        for tensor in linears["proj"].state_dict(keep_vars=True).values():
            if isinstance(tensor, torch.Tensor):
                tensor.data.zero_()  # a new Linear4bit is empty: whatever was in memory
    return nn.ModuleDict({"embed": nn.Embedding(4, d), "layers": blocks, "lm_head": nn.Linear(d, 4, bias=False)})


def get(net: nn.Module, name: str) -> nn.Module | None:
    for part in name.split(".") if name else ():
        net = getattr(net, part, None)
    return net


def wrapped(net: nn.Module) -> list[str]:
    """The names that lead to a LoRALinear, step by step as the model's own code would go."""
    return [name for name, _ in net.named_modules() if isinstance(get(net, name), LoRALinear)]


@EXERCISE.property("apply_lora: a LoRALinear in the place of each target, around the very layer; all else stays")
def in_place(draw: Draw):
    for most in SIZES:
        for targets, kinds in (
            (["q_proj"], ("q_proj",)),
            (["v_proj", "proj"], ("v_proj", "proj")),
            ("all-linear", ("q_proj", "v_proj", "proj")),
            (["lm_head"], ("lm_head",)),
        ):
            net = small(draw, most)
            before, tensors = dict(net.named_modules()), [*net.parameters(), *net.buffers()]
            values = [tensor.detach().clone() for tensor in tensors]
            linears = [name for name, module in before.items() if hasattr(module, "in_features")]
            right, case = ends(linears, *kinds), {"linear layers": linears, "target_modules": targets}
            returned = apply_lora(net, LoRAConfig(r=2, target_modules=targets))
            slips = {
                "no wrapper is in the model: set it as attribute of the module above, as replace_module does": [],
                "every linear layer is wrapped, target or not": linears,
                "only the first target is wrapped": right[:1],
                "layers in 4 bits are passed over; linear_layers(model) has them too": [
                    name for name in right if not isinstance(before[name], Linear4bit)
                ],
                "all but the targets are wrapped": [name for name in linears if name not in right],
            }
            expect(wrapped(net), right, case, slips, "wrapped")
            for name, module in before.items():
                now = get(net, f"{name}.base_layer" if name in right else name)
                slip = "wrap the layer itself, no copy: another module may share its weight" if name in right else ""
                require(now is module, f"{name} is another object than before", case, slip)
            same = all(torch.equal(tensor, value) for tensor, value in zip(tensors, values, strict=True))
            require(same, "weights of the base have changed", case, "applying LoRA changes no weight")
            require(returned is net, "expected the model back, the same object", case, "return the model")


@EXERCISE.property("apply_lora: r, lora_alpha and the other settings reach the layers, those of the patterns too")
def settings(draw: Draw):
    for most in SIZES:
        net, alpha, own = small(draw, most), draw.integer(5, 20), draw.integer(21, 40)
        patterns = {"rank_pattern": {"layers.1.q_proj": 3}, "alpha_pattern": {"v_proj": own}}
        config = LoRAConfig(2, alpha, 0.25, ["q_proj", "v_proj"], **patterns)
        apply_lora(net, config)
        names = ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]
        require(wrapped(net) == names, f"expected LoRALinears at {names}, found them at {wrapped(net)}")
        right = {"r": [2, 2, 3, 2], "lora_alpha": [alpha, own] * 2, "lora_dropout": [0.25] * 4}
        slips = {
            "r": {"rank_pattern is passed over: make_layer or layer_rank looks into it": [2] * 4},
            "lora_alpha": {"alpha_pattern is passed over: make_layer or pattern_value looks into it": [alpha] * 4},
            "lora_dropout": {"lora_dropout is not passed on": [0.0] * 4},
        }
        case = {"r": 2, "lora_alpha": alpha, "lora_dropout": 0.25, **patterns}
        for field, values in right.items():
            expect([getattr(get(net, n), field) for n in names], values, case, slips[field], f"{field} of {names}")
        slip = "note it: model.lora_config = config"
        require(getattr(net, "lora_config", None) is config, "model.lora_config should be the config", case, slip)


@EXERCISE.property("apply_lora: A and B are trainable, and nothing else")
def frozen(draw: Draw):
    for most in SIZES:
        net = small(draw, most)
        net["layers"][0]["norm"].requires_grad_(False)
        apply_lora(net, LoRAConfig(r=2, target_modules=["q_proj"]))
        names = [name for name, _ in net.named_parameters()]
        right = [name for name in names if ".lora_" in name]
        slips = {
            "nothing is frozen": [name for name in names if not name.startswith("layers.0.norm")],
            "the layers with an adapter are frozen, and the rest is not": [
                name for name in names if ".base_layer." not in name and not name.startswith("layers.0.norm")
            ],
            "the base layers were not frozen: wrap first, freeze afterwards": [n for n in names if ".q_proj." in n],
            "A and B are frozen as well: train_adapter_only comes last": [],
        }
        found = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
        expect(found, right, {"target_modules": ["q_proj"], "parameters": len(names)}, slips, "trainable")


@EXERCISE.property("apply_lora: what is refused leaves the model as it was")
def refused(draw: Draw):
    for most in SIZES:
        net = small(draw, most)
        net["embed"].requires_grad_(False)
        before = {name: id(module) for name, module in net.named_modules()}
        flags = [parameter.requires_grad for parameter in net.parameters()]
        for fields, named in (
            ({"target_modules": ["q_proj", "query"]}, "query"),
            ({"target_modules": "q_proj"}, "q_proj"),
            ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 3}}, "v_proj"),
            ({"target_modules": ["q_proj"], "alpha_pattern": {"up_proj": 3}}, "up_proj"),
        ):
            slip = "check_targets(model, config) refuses what does not match"
            expect_error(lambda net=net, f=fields: apply_lora(net, LoRAConfig(r=2, **f)), (named,), fields, slip)
            slip = "first check everything, then change the model"
            same = before == {name: id(module) for name, module in net.named_modules()}
            require(same, "the refused call has put wrappers into the model", fields, slip)
            same = flags == [parameter.requires_grad for parameter in net.parameters()]
            require(same, "the refused call has changed requires_grad", fields, slip)
            require(not hasattr(net, "lora_config"), "the refused call has set lora_config", fields, slip)
        layer = net["layers"][1]
        layer["v_proj"] = assemble(draw, layer["v_proj"], 2, 4)
        case, slip = (
            {"layers.1.v_proj": "a LoRALinear"},
            "a model that has LoRA layers is refused: check_targets does that",
        )
        expect_error(lambda net=net: apply_lora(net, LoRAConfig(r=2, target_modules=["q_proj"])), (), case, slip)
        require(wrapped(net) == ["layers.1.v_proj"], f"the refused call has wrapped: {wrapped(net)}", case, slip)


@EXERCISE.property("apply_lora: a rank above the layer's own is warned about by name, and allowed")
def warned(draw: Draw):
    for most in SIZES:
        d = draw.integer(2, most)
        shapes = {"up_proj": (d, d + 2), "down_proj": (d + 2, d), "q_proj": (d + 1, d + 1)}
        for r, pattern, right, slips in (
            (d + 3, {}, [*shapes], {"no warning comes; warnings.warn(...) if r is above min(in, out)": []}),
            (
                d + 1,
                {},
                ["up_proj", "down_proj"],
                {
                    "the limit is min(in, out), the highest rank that a matrix of this shape has": [],
                    "out limits the rank as well as in": ["up_proj"],
                    "in limits the rank as well as out": ["down_proj"],
                    "r equal to min(in, out) is no cause for a warning": [*shapes],
                },
            ),
            (1, {"q_proj": d + 2}, ["q_proj"], {"the r that rank_pattern gives is passed over": []}),
        ):
            net = nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()})
            case = {"(in, out)": shapes, "r": r, "rank_pattern": pattern}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    apply_lora(net, LoRAConfig(r=r, target_modules=[*shapes], rank_pattern=pattern))
                except ValueError as error:
                    require(False, f"expected a warning, got ValueError: {error}", case, "warn, and go on")
            found = [name for name in shapes if any(name in str(warning.message) for warning in caught)]
            expect(found, right, case, slips, "layers that are warned about")
            require(wrapped(net) == [*shapes], f"expected all to be wrapped, found {wrapped(net)}", case)
