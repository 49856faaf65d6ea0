"""Exercise 16: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "adapters.prompts": """
class PrefixTuning:
    @staticmethod
    def start(model, ids):
        seen = KVCache()
        model(ids, seen)
        rows = []
        for place in range(ids.shape[1]):
            row = []
            for layer in range(len(seen.layers)):
                key, value = seen.layers[layer]
                row += [key[0, :, place], value[0, :, place]]  # (K, D) each
            rows.append(torch.cat([part.reshape(-1) for part in row]))
        return torch.stack(rows)

    def forward(self, input_ids, cache=None, where=None):
        used = cache if cache is not None else self.new_cache(input_ids.shape[0])
        self.check_cache(used)
        logits = self.base_model(input_ids, used, where)
        return logits

    def new_cache(self, rows, padding=None):
        L, pair, K, D = self.shape(self.base_model.config)
        numbers = self.prompt_embeddings
        blocks = numbers.unflatten(1, (L, pair, K, D))
        layers = {}
        for layer in range(L):
            k, v = blocks[:, layer, 0], blocks[:, layer, 1]  # (n, K, D)
            k, v = k.transpose(0, 1), v.transpose(0, 1)
            layers[layer] = tuple(x.unsqueeze(0).repeat(rows, 1, 1, 1) for x in (k, v))
        mask = None
        if padding is not None:
            mask = torch.cat([torch.zeros(rows, len(numbers), dtype=torch.bool), padding], dim=1)
        cache = KVCache(mask, layers)
        return cache
"""
}

BLOCKS = "blocks = numbers.unflatten(1, (L, pair, K, D))"
SLICES = "k, v = blocks[:, layer, 0], blocks[:, layer, 1]"
READ = "        model(ids, seen)\n"
ALONE = """
        for t in range(ids.shape[1]):
            one = KVCache()
            model(ids[:, t : t + 1], one)
            for layer, parts in one.layers.items():
                old = seen.layers.get(layer)
                seen.layers[layer] = parts if old is None else tuple(torch.cat([a, b], 2) for a, b in zip(old, parts))
"""
UNTURNED = """        model(ids, seen)
        y = model.model.embed(ids)
        for layer, block in enumerate(model.model.layers):
            k = block.self_attn.k_proj(block.input_layernorm(y)).unflatten(-1, (-1, block.self_attn.head_dim))
            seen.layers[layer] = (k.transpose(1, 2), seen.layers[layer][1])
            rotary = rotary_cos_sin(model.config, torch.arange(ids.shape[1])[None])
            y = block(y, rotary)[0]
"""

MUTANTS = [
    Mutant(
        "start: value first",
        "[key[0, :, place], value[0, :, place]]",
        "[value[0, :, place], key[0, :, place]]",
        "keys and values are swapped",
    ),
    Mutant(
        "start: heads and features", "part.reshape(-1)", "part.T.reshape(-1)", "heads and their features are mixed up"
    ),
    Mutant(
        "start: keys of all layers first",
        "torch.cat([part.reshape(-1) for part in row])",
        "torch.cat([part.reshape(-1) for part in row[::2] + row[1::2]])",
        "layers and keys/values are mixed up",
    ),
    Mutant("start: each token alone", READ, ALONE, "each token was read alone"),
    Mutant(
        "start: keys before the rotation",
        ("\nclass PrefixTuning", READ),
        ("\nfrom minilora.model import rotary_cos_sin\n\nclass PrefixTuning", UNTURNED),
        "not turned by their positions",
    ),
    Mutant(
        "start: flattened as it lies",
        "return torch.stack(rows)",
        "return torch.stack([torch.cat(pair) for pair in seen.layers.values()]).reshape(ids.shape[1], -1)",
        "permute moves",
    ),
    Mutant(
        "new_cache: value first",
        SLICES,
        "v, k = blocks[:, layer, 0], blocks[:, layer, 1]",
        "keys and values are swapped",
    ),
    Mutant(
        "new_cache: (2, L, K, D)",
        (BLOCKS, SLICES),
        (BLOCKS.replace("L, pair", "pair, L"), "k, v = blocks[:, 0, layer], blocks[:, 1, layer]"),
        "layers and keys/values are mixed up",
    ),
    Mutant(
        "new_cache: (L, 2, D, K)",
        BLOCKS,
        "blocks = numbers.unflatten(1, (L, pair, D, K)).transpose(-1, -2)",
        "heads and their features are mixed up",
    ),
    Mutant(
        "new_cache: view instead of permute",
        BLOCKS,
        "blocks = numbers.view(L, pair, K, len(numbers), D).permute(3, 0, 1, 2, 4)",
        "permute moves",
    ),
    Mutant("new_cache: layers backwards", "layers[layer] =", "layers[L - 1 - layer] =", "in the wrong order"),
    Mutant("new_cache: one row", ".repeat(rows, 1, 1, 1)", "", "expand it to `rows` rows"),
    Mutant("new_cache: no rows", "x.unsqueeze(0).repeat(rows, 1, 1, 1)", "x", "the dimension of the rows is missing"),
    Mutant(
        "new_cache: heads and places", "k, v = k.transpose(0, 1), v.transpose(0, 1)", "pass", "that is (rows, n, K, D)"
    ),
    Mutant(
        "new_cache: keys turned again",
        ("\nclass PrefixTuning", "k, v = k.transpose(0, 1), v.transpose(0, 1)"),
        (
            "\nfrom minilora.model import apply_rotary, rotary_cos_sin\n\nclass PrefixTuning",
            "k, v = k.transpose(0, 1), v.transpose(0, 1)\n"
            "            places = torch.arange(k.shape[1])[None]\n"
            "            k = apply_rotary(k, *rotary_cos_sin(self.base_model.config, places))[0]",
        ),
        "used as they are",
    ),
    Mutant("new_cache: padding lost", "KVCache(mask, layers)", "KVCache(None, layers)", "pass padding on"),
    Mutant(
        "new_cache: padding as given", "KVCache(mask, layers)", "KVCache(padding, layers)", "put n columns of False"
    ),
    Mutant(
        "new_cache: prefix as padding", "torch.zeros(rows,", "torch.ones(rows,", "columns of the prefix are no padd"
    ),
    Mutant(
        "new_cache: prefix behind the text",
        "torch.cat([torch.zeros(rows, len(numbers), dtype=torch.bool), padding], dim=1)",
        "torch.cat([padding, torch.zeros(rows, len(numbers), dtype=torch.bool)], dim=1)",
        "the prefix stands in front of the text",
    ),
    Mutant(
        "new_cache: padding for all",
        "mask = None\n",
        "mask = torch.zeros(rows, len(numbers), dtype=torch.bool)\n",
        "None stays None",
    ),
    Mutant(
        "forward: padding lost",
        "logits = self.base_model(input_ids, used, where)",
        "logits = self.base_model(input_ids, KVCache(None, used.layers), where)",
        "the padding is ignored",
    ),
    Mutant(
        "new_cache: no empty prefix", "layers = {}", "layers = {}\n        n = 1 / len(numbers)", "ZeroDivisionError"
    ),
    Mutant("start: the text backwards", "rows.append(", "rows.insert(0, ", "the places are in the wrong order"),
    Mutant(
        "new_cache: detached",
        "numbers = self.prompt_embeddings\n",
        "numbers = self.prompt_embeddings.detach()\n",
        "the prefix is detached",
    ),
    Mutant("new_cache: keys detached", "for x in (k, v)", "for x in (k.detach(), v)", "no gradient reaches the keys"),
    Mutant(
        "new_cache: the same one each time",
        "return cache",
        "self.kept = getattr(self, 'kept', {})\n        return self.kept.setdefault(rows, cache)",
        "make a new one each time",
    ),
    Mutant(
        "forward: without the prefix",
        "self.base_model(input_ids, used, where)",
        "self.base_model(input_ids, cache, where)",
        "begin with new_cache",
    ),
    Mutant("forward: all places", "used, where)", "used)", "that is every place: pass where on"),
    Mutant("forward: cut by n", "return logits", "return logits[:, self.length :]", "cut nothing off"),
    Mutant(
        "forward: cache ignored",
        "cache if cache is not None else self.new_cache(input_ids.shape[0])",
        "self.new_cache(input_ids.shape[0])",
        "the cache that was given is not used",
    ),
    Mutant(
        "forward: rows and tokens",
        "self.new_cache(input_ids.shape[0])",
        "self.new_cache(input_ids.shape[1])",
        "RuntimeError",
    ),
    Mutant("forward: cache not checked", "        self.check_cache(used)\n", "", "call self.check_cache"),
]
