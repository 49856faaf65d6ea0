"""Exercise 16: prefix tuning, trained keys and values in front of every layer's own."""

from functools import partial

import torch
from torch import Tensor, nn

from minilora.adapters.prompts import PrefixTuning
from minilora.exercises.checking import Draw, Exercise, expect, expect_error, require
from minilora.model import GPT, GPTConfig, KVCache, apply_rotary, rotary_cos_sin

EXERCISE = Exercise(
    number=16,
    slug="prefix",
    title="Prefix tuning",
    targets=tuple(f"adapters.prompts:PrefixTuning.{name}" for name in ("start", "forward", "new_cache")),
    changes=("adapters.prompts:PrefixTuning.forward",),  # the cache, which grows
    difficulty=2,
    minutes=40,
    notebook="04_variants",
    section="4. Three promises, tried",
    explanation="""\
Attention looks at the keys and values of the tokens before it, and does not ask where they come from. Prefix tuning
(Li & Liang 2021) puts n of each, trained, in front of the text's own, in every layer. The model stays frozen. The one
parameter has a row for each of the n places; cut into (L, 2, K, D) it holds, layer by layer, a key and a value for each
of the K key/value heads:

    prompt_embeddings (n, L·2·K·D)        key, value of a layer in the cache (B, K, n, D)

- `start(model, ids)`: ids (1, n). What the model makes of this text at positions 0 … n-1, in that layout. The keys are
  those in a `KVCache` that the model has filled, turned by their positions. Nothing turns them again.
- `new_cache(rows, padding)`: a new `KVCache` that begins with the prefix, the same for every row, through which
  gradients reach it. `padding` (rows, T) is True at the text's pad tokens, or None. The cache's own `padding` counts
  columns from the prefix on, so it has n columns more, which are False; None stays None. `cache_of(layers, rows,
  padding)` makes such a cache of keys and values (1, K, n, D) by layer.
- `forward(ids, cache, where)`: logits (B, T, V) of the text alone. Without a cache it begins with a new one; a given
  one is used, after `check_cache`: one with fewer columns than the prefix is refused with ValueError. `where`, rows and
  columns of N places, or None, goes on to the model, which then returns (N, V).

Because the cache has n columns already, the model gives the text the positions n, n+1, … by itself. So at the start a
wrapped model says what it says after reading the text. With n = 0 it is the model alone.""",
    hints=(
        "Let the model fill a KVCache: model(ids, cache). Then cache.layers[l] is the pair (key, value) of layer l, "
        "each (1, K, n, D). The way back is self.cache_of(layers, rows, padding) with such pairs.",
        "view only cuts: of (n, L·2·K·D) it makes (n, L, 2, K, D), in this order. permute then moves the places n to "
        "between K and D. cache_of repeats for every row, by expand, which keeps the gradient.",
        "new_cache: prompt_embeddings.view(n, L, 2, K, D).permute(1, 2, 3, 0, 4) is (L, 2, K, n, D): cache_of gets {l: "
        "(key[None], value[None])} with the key [l, 0] and the value [l, 1]. start: stack the pairs to (L, 2, K, n, "
        "D), then permute(3, 0, 1, 2, 4) and flatten(1). forward: the cache, self.check_cache, then "
        "self.base_model(input_ids, cache, where).",
    ),
    question="Nothing turns the keys of a prefix by a position. Why do the text's positions begin at n nevertheless, "
    "and what would be lost at the start if they began at 0?",
    answer="The model was trained on text whose positions are told by turning keys and queries against one another, "
    "and only the distance between two counts. If the text's positions began at 0, nothing among the text itself "
    "would change, for its distances stay. But a prefix that was made from the keys of real tokens has those keys "
    "turned by positions 0 to n - 1: the text begins at n so that it stands behind them, as it would behind real "
    "tokens, and so a prefix can start as a real text's keys and values and give exactly what that text would. "
    "Beginning at 0, this start would be lost.",
)

SIZES = (2, 4)  # the largest n, and about the largest T
VOCABULARY = 11


def tiny(draw: Draw, most: int) -> GPT:
    """A model of 2 or 3 layers with grouped heads, and weights so large that every token before counts."""
    K, D, L = draw.integer(2, 3), 4, 2 if most == SIZES[0] else 3
    shape = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2 * K, num_key_value_heads=K, head_dim=D)
    model = GPT(GPTConfig(VOCABULARY, num_hidden_layers=L, max_position_embeddings=40, **shape)).double()
    for parameter in model.parameters():
        parameter.data = draw.normal(*parameter.shape) * 0.6
    return model


def tokens(draw: Draw, *shape: int) -> Tensor:
    return (draw.normal(*shape) * 100).long() % VOCABULARY


def trained(draw: Draw, most: int, n: int | None = None) -> PrefixTuning:
    """A prefix of random numbers; how it starts is a property of its own."""
    prefix, n = PrefixTuning(tiny(draw, most), 0), draw.integer(1, most) if n is None else n
    prefix.prompt_embeddings = nn.Parameter(draw.normal(n, PrefixTuning.width(prefix.base_model.config)))
    return prefix


def about(model: GPT, **more) -> dict:
    L, _, K, D = PrefixTuning.shape(model.config)
    return {**more, "layers": L, "key/value heads": K, "head_dim": D}


# A prefix in the order in which it lies, (n, L·2·K·D), and in that of use, (L, 2, K, n, D).
RIGHT = "nljkd"
MIXED = {
    "layers and keys/values are mixed up: a row is (L, 2, K, D), each layer's key beside its value": "njlkd",
    "heads and their features are mixed up: a row is (L, 2, K, D)": "nljdk",
    "heads and layers are mixed up: a row is (L, 2, K, D)": "nkljd",
    "places are mixed up with the rest: view and reshape only cut, permute moves": "ljknd",
    "places and layers are mixed up: n comes first": "lnjkd",
    "places and heads are mixed up: a cache has (rows, K, n, D)": "ljnkd",
}
SWAPPED = "keys and values are swapped: the key is the first of the two"


def lying(pairs: Tensor, order: str = RIGHT) -> Tensor:
    return torch.einsum(f"ljknd->{order}", pairs).reshape(pairs.shape[3], -1)


def in_use(numbers: Tensor, config: GPTConfig, order: str = RIGHT) -> Tensor:
    L, _, K, D = PrefixTuning.shape(config)
    sizes = dict(n=len(numbers), l=L, j=2, k=K, d=D)
    return torch.einsum(f"{order}->ljknd", numbers.reshape([sizes[letter] for letter in order]))


def turned(pairs: Tensor, config: GPTConfig, way: int) -> Tensor:
    """With the keys turned by the positions 0 … n-1, or back (way -1)."""
    cos, sin = rotary_cos_sin(config, torch.arange(pairs.shape[3])[None])
    stretch = cos.double() ** 2 + sin.double() ** 2 if way < 0 else 1  # there and back; they are rounded to float32
    return torch.stack([apply_rotary(pairs[:, 0], cos, way * sin) / stretch, pairs[:, 1]], dim=1)


def cache_with(numbers: Tensor, config: GPTConfig, rows: int) -> KVCache:
    layers = [tuple(torch.stack([part] * rows) for part in layer) for layer in in_use(numbers, config)]
    return KVCache(None, dict(enumerate(layers)))


def read(model: GPT, ids: Tensor) -> Tensor:
    """The keys and values of a text (1, n), (L, 2, K, n, D)."""
    with torch.no_grad():
        model(ids, filled := KVCache())
    return torch.stack([torch.cat(filled.layers[layer]) for layer in range(model.config.num_hidden_layers)])


@EXERCISE.property("start: the text's keys and values, (n, L·2·K·D)")
def start(draw: Draw):
    for most in SIZES:
        model, n = tiny(draw, most), draw.integer(2, most)
        ids = (tokens(draw, 1, 1) + torch.arange(n)) % VOCABULARY  # equal tokens would make equal values
        pairs, singly = read(model, ids), torch.cat([read(model, one) for one in ids.split(1, dim=1)], dim=3)
        slips = {SWAPPED: lying(pairs.flip(1)), **{slip: lying(pairs, order) for slip, order in MIXED.items()}}
        unturned = turned(pairs, model.config, -1)
        slips["the keys are not turned by their positions; those in the cache are"] = lying(unturned)
        slips["each token was read alone; read the text as one sequence"] = lying(singly)
        slips["the places are in the wrong order"] = lying(pairs.flip(3))
        expect(PrefixTuning.start(model, ids), lying(pairs), about(model, ids=ids), slips, "start(model, ids)")


@EXERCISE.property("new_cache: for each layer a key and a value (rows, K, n, D), the same for every row")
def cache_of_prefix(draw: Draw):
    for most in SIZES:
        prefix, rows = trained(draw, most, draw.integer(2, most)), draw.integer(2, 3)
        model, config = prefix.base_model, prefix.base_model.config
        padding = torch.arange(3) < torch.arange(rows)[:, None]  # of a text of 3 tokens, row b begins with b of them
        numbers, case = prefix.prompt_embeddings.detach(), about(model, n=prefix.length, rows=rows)
        cache, right = prefix.new_cache(rows, padding), in_use(numbers, config)
        require(isinstance(cache, KVCache), f"expected a KVCache, got {type(cache).__name__}", case)
        expect(sorted(cache.layers), list(range(len(right))), case, what="the layers that have an entry")
        wrong = {SWAPPED: right.flip(1), **{slip: in_use(numbers, config, order) for slip, order in MIXED.items()}}
        wrong["the keys are turned by positions; a prefix's keys are used as they are"] = turned(right, config, 1)
        wrong["the layers are in the wrong order"] = right.flip(0)
        for layer, pair in cache.layers.items():
            for j, name in enumerate(("key", "value")):
                slips = {slip: torch.stack([value[layer, j]] * rows) for slip, value in wrong.items()}
                slips["every row needs the prefix: expand it to `rows` rows"] = right[layer, j][None]
                slips["the dimension of the rows is missing; expand to (rows, K, n, D)"] = right[layer, j]
                places_first = torch.stack([right[layer, j].transpose(0, 1)] * rows)
                slips["that is (rows, n, K, D); a cache has (rows, K, n, D)"] = places_first
                expect(pair[j], torch.stack([right[layer, j]] * rows), case, slips, f"the {name} of layer {layer}")
        require(cache.padding is not None, "the padding is lost", case, "pass padding on to the cache")
        none, every = (torch.full((rows, prefix.length), value) for value in (False, True))
        slips = {
            "the cache counts columns from the prefix on: put n columns of False in front of padding": padding,
            "the columns of the prefix are no padding: every row sees them": torch.cat([every, padding], dim=1),
            "the prefix stands in front of the text, and so do its columns": torch.cat([padding, none], dim=1),
        }
        expect(cache.padding, torch.cat([none, padding], dim=1), case, slips, "the cache's padding")
        slip = "without padding the cache has none: None stays None"
        require(prefix.new_cache(rows).padding is None, "expected the cache's padding to be None", case, slip)


@EXERCISE.property("forward: the logits of the text (B, T, V), behind the prefix")
def logits(draw: Draw):
    for most in SIZES:
        prefix, ids = trained(draw, most), tokens(draw, draw.integer(1, 3), draw.integer(2, most))
        n, model = prefix.length, prefix.base_model
        with torch.no_grad():
            expected = model(ids, cache_with(prefix.prompt_embeddings, model.config, len(ids)))
            slips = {
                "that is the model without the prefix: begin with new_cache": model(ids),
                "the prefix has no logits here: cut nothing off": expected[:, n:],
            }
            expect(prefix(ids), expected, about(model, ids=ids, n=n), slips, "the logits")
            where = torch.arange(len(ids)), torch.arange(len(ids)) % ids.shape[1]  # one place of each row
            case, slip = about(model, ids=ids, n=n, where=where), "that is every place: pass where on"
            expect(prefix(ids, where=where), expected[where], case, {slip: expected}, "the logits at the places where")


@EXERCISE.property("at the start the logits are the model's after reading the text")
def started(draw: Draw):
    for most in SIZES:
        model, n = tiny(draw, most), draw.integer(1, most)
        text, ids = tokens(draw, n), tokens(draw, draw.integer(1, 3), draw.integer(1, most))
        with torch.no_grad():
            expected, without = model(torch.cat([text.expand(len(ids), -1), ids], dim=1))[:, n:], model(ids)
            found, slip = PrefixTuning(model, n, text.tolist())(ids), "that is the model without the text"
            expect(found, expected, about(model, text=text, ids=ids), {slip: without}, "the logits", 1e-4)


@EXERCISE.property("a gradient reaches every number of the prefix")
def gradients(draw: Draw):
    for most in SIZES:
        prefix, ids, weights = trained(draw, most), tokens(draw, 2, 3), draw.normal(2, 3, VOCABULARY)
        numbers, model = prefix.prompt_embeddings.detach().clone().requires_grad_(), prefix.base_model
        total = (model(ids, cache_with(numbers, model.config, 2)) * weights).sum()
        (expected,) = torch.autograd.grad(total, numbers)
        slip = "the prefix is detached, copied into a new tensor, or used under no_grad"
        found, case, grad = (prefix(ids) * weights).sum(), about(model, n=prefix.length), None
        if found.requires_grad:
            (grad,) = torch.autograd.grad(found, prefix.prompt_embeddings, allow_unused=True)
        require(grad is not None, "no gradient reaches prompt_embeddings", case, slip)
        half = torch.tensor([1.0, 0.0]).double().view(2, 1, 1, 1) * in_use(expected, model.config)
        slips = {
            "no gradient reaches the values": lying(half),
            "no gradient reaches the keys": expected - lying(half),
        }
        expect(grad, expected, case, slips, "the gradient of prompt_embeddings")


@EXERCISE.property("with a cache from new_cache, piece by piece, the logits are the same; another cache is refused")
def piece_by_piece(draw: Draw):
    for most in SIZES:
        prefix, T = trained(draw, most), draw.integer(2, most + 1)
        model, n, cut, ids = prefix.base_model, prefix.length, draw.integer(1, T - 1), tokens(draw, 2, T)
        begin = partial(cache_with, prefix.prompt_embeddings, model.config, 2)
        case = about(model, ids=ids, n=n, cut=cut)
        with torch.no_grad():
            whole, cache = model(ids, begin()), prefix.new_cache(2)
            found = torch.cat([prefix(ids[:, :cut], cache), prefix(ids[:, cut:], cache)], dim=1)
            slip = "the cache that was given is not used: what was read before is forgotten"
            slips = {slip: torch.cat([whole[:, :cut], model(ids[:, cut:], begin())], dim=1)}
            expect(found, whole, case, slips, "the logits in two pieces")
        expect(len(cache), n + T, case, what="the length of the cache after the text")
        slip = "new_cache gives out a cache that another call has filled; make a new one each time"
        expect(len(prefix.new_cache(2)), n, case, {slip: n + T}, "the length of a new cache")
        slip = "call self.check_cache(cache) for the cache that was given"
        for columns in (0, n - 1):
            other = cache_with(draw.normal(columns, prefix.prompt_embeddings.shape[1]), model.config, 2)
            expect_error(partial(prefix, ids, other), case={**case, "columns in the cache": columns}, slip=slip)


@EXERCISE.property("rows with padding: each as if it were alone")
def padded(draw: Draw):
    for most in SIZES:
        prefix, T = trained(draw, most), draw.integer(3, most + 1)
        ids, model, pad = tokens(draw, 2, T), prefix.base_model, draw.integer(1, T - 1)
        begin = partial(cache_with, prefix.prompt_embeddings, model.config)
        padding = torch.arange(T) < torch.tensor([[pad], [0]])
        with torch.no_grad():
            alone, ignored = model(ids[:1, pad:], begin(1)), model(ids, begin(2))[:1, pad:]
            found = prefix(ids, prefix.new_cache(2, padding))[:1, pad:]
            case, slip = about(model, ids=ids, padding=[pad, 0], n=prefix.length), "the padding is ignored: pass it on"
            expect(found, alone, case, {slip: ignored}, "the logits of the row with padding")


@EXERCISE.property("with n = 0 it is the model alone")
def nothing(draw: Draw):
    prefix, ids = trained(draw, 2, n=0), tokens(draw, 2, 4)
    with torch.no_grad():
        expect(prefix(ids), prefix.base_model(ids), {"ids": ids, "n": 0}, what="the logits")
