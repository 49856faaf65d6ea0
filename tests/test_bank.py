"""Many adapters in one batch, held against each of them alone on a copy of the base."""

import copy
import random

import pytest
import torch
from torch import nn

from minilora.adapters.adapter import Adapter, apply_adapter, extract_adapter
from minilora.adapters.inject import adapter_parameters, apply_lora
from minilora.adapters.prompts import PrefixTuning, Prompt, SoftPrompt
from minilora.config import LoRAConfig
from minilora.inference.bank import AdapterBank
from minilora.inference.bank_layers import BankedLinear, common_rank, norms
from minilora.inference.generate import generate
from minilora.linear4bit import quantize_model
from minilora.model import GPT, GPTConfig, KVCache
from minilora.quant import Quantization
from minilora.storage.adapters import save_adapter
from minilora.storage.prompts import save_prompt

VOCABULARY, LIMIT = 24, 32
PATTERNS = dict(rank_pattern={"layers.0.self_attn.o_proj": 4}, alpha_pattern={"up_proj": 1})
CONFIGS = {
    "few": dict(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"]),
    "all": dict(r=5, lora_alpha=4, target_modules="all-linear"),
    "stable": dict(r=3, lora_alpha=2, target_modules=["down_proj"], use_rslora=True),
    "one": dict(r=1, lora_alpha=1, target_modules=r"model\.layers\.1\.mlp\.up_proj"),
    "head": dict(r=2, lora_alpha=2, target_modules=["lm_head", "k_proj"]),
    "patterns": dict(r=2, lora_alpha=5, target_modules=["o_proj", "up_proj"], **PATTERNS),
    "dora": dict(r=8, lora_alpha=4, target_modules="all-linear", use_dora=True),
}
ROWS = ["few", None, "patterns", "all", "few", "one", "dora", "stable", "head"]
PROMPTED = ["soft", "few", "prefix", None, "dora", "short", "all", "prefix", "soft"]


def base(dtype=torch.float64, seed=0, **changes) -> GPT:
    """With weights large enough that every layer shows in the logits."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LIMIT)
    model = GPT(GPTConfig(**shape, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.to(dtype)


def random_prompt(seed: int, kind: type[Prompt], n: int) -> Prompt:
    torch.manual_seed(seed)
    prompt = kind(base(), n)
    nn.init.normal_(prompt.prompt_embeddings, std=0.7)
    return prompt


def random_adapter(seed: int, **settings) -> Adapter:
    """Random A and B; their values are float32's, so a file loses nothing."""
    model = apply_lora(base(), LoRAConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return extract_adapter(model)


ADAPTERS = {name: random_adapter(seed, **config) for seed, (name, config) in enumerate(CONFIGS.items())}
PROMPTS = {"soft": random_prompt(1, SoftPrompt, 3), "prefix": random_prompt(2, PrefixTuning, 5)}
PROMPTS["short"] = random_prompt(3, SoftPrompt, 1)
EVERY = ADAPTERS | PROMPTS
IDS = torch.randint(VOCABULARY, (len(ROWS), 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def bank() -> AdapterBank:
    return AdapterBank(base(), ADAPTERS)


def alone(adapter: Adapter | Prompt | None, model: GPT | None = None) -> GPT | Prompt:
    """The reference: a model of its own for one adapter."""
    model = copy.deepcopy(model or base())
    if isinstance(adapter, Prompt):
        own = type(adapter)(model, 0).eval()
        own.prompt_embeddings = adapter.prompt_embeddings
        return own
    return (model if adapter is None else apply_adapter(model, adapter)).eval()


def logits(model: GPT | Prompt, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Those at the ids; a SoftPrompt gives more in front of them."""
    with torch.no_grad():
        return model(ids)[:, -ids.shape[1] :]


def assert_rows(found, names, model: GPT | None = None, adapters=EVERY, ids=IDS, tolerance=1e-10):
    expected = {name: logits(alone(adapters[name] if name else None, model), ids) for name in set(names)}
    for row, name in enumerate(names):
        error = ((found[row] - expected[name][row]).abs().max() / expected[name][row].abs().max()).item()
        assert error <= tolerance, f"row {row} ({name}) is off by {error:.1e} of the largest logit, over {tolerance}"


# Rows


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("shape", [{}, dict(tie_word_embeddings=True, attention_bias=True)], ids=["plain", "tied"])
def test_each_row_equals_its_adapter_alone(shape, dtype, tolerance):
    model = base(dtype, **shape)
    found = AdapterBank(copy.deepcopy(model), ADAPTERS)(IDS, ROWS)
    assert_rows(found, ROWS, model, tolerance=tolerance)
    change = (found - logits(model)).abs().amax((1, 2)).tolist()
    assert all(change[row] > 0.01 for row, name in enumerate(ROWS) if name), f"an adapter that does little: {change}"


@pytest.mark.parametrize("quantized", [True, False])
def test_a_base_in_4_bits_or_in_bfloat16(quantized):
    model = quantize_model(base(), Quantization(block_size=16)) if quantized else base(torch.bfloat16)
    found = AdapterBank(copy.deepcopy(model), ADAPTERS)(IDS, ROWS)
    assert found.dtype == (torch.float64 if quantized else torch.bfloat16), f"the logits are {found.dtype}"
    # In bfloat16 the bank rounds s·B, the reference B: they differ as much as two roundings of the same model. And on
    # 4 bits the reference's DoRA computes its norms in float32.
    assert_rows(found, ROWS, model, tolerance=1e-7 if quantized else 0.04)


def test_a_row_without_an_adapter_is_the_base_bit_for_bit(bank):
    expected, plain = logits(base()), [row for row, name in enumerate(ROWS) if name is None]
    off = (bank(IDS, ROWS)[plain] - expected[plain]).abs().max().item()
    assert off == 0, f"rows without an adapter should be the base's, and differ from them by up to {off:.3g}"
    assert torch.equal(bank(IDS, [None] * len(ROWS)), expected), "without any adapter it should be the base bit for bit"


def test_permuted_rows_give_permuted_outputs(bank):
    found, order = bank(IDS, ROWS), torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(bank(IDS[order], [ROWS[row] for row in order]), found[order], rtol=0, atol=1e-12)


def test_outside_a_batch_it_is_the_base_also_after_an_error(bank):
    expected = logits(base())
    assert torch.equal(logits(bank.model), expected), (
        f"outside a batch it should be the base, and differs by up to {(logits(bank.model) - expected).abs().max():.3g}"
    )
    with bank.rows(ROWS) as model:
        assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(bank.model), expected), (
        f"outside a batch it should be the base, and differs by up to {(logits(bank.model) - expected).abs().max():.3g}"
    )
    with pytest.raises(ZeroDivisionError), bank.rows(ROWS):
        _ = 1 / 0
    assert torch.equal(logits(bank.model), expected), "after an error"
    assert_rows(bank(IDS, ROWS), ROWS)


def test_the_base_is_shared_and_untouched():
    model = base()
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    bank = AdapterBank(model, ADAPTERS)
    bank(IDS, ROWS)
    after = {name.replace(".base_layer", ""): p for name, p in bank.model.named_parameters()}
    assert after.keys() == before.keys()
    for name, (address, value) in before.items():
        same = after[name].data_ptr() == address and torch.equal(after[name], value)
        assert same and not after[name].requires_grad, name


def test_cached_decoding_equals_the_full_forward(bank):
    padding = [0, 3, 1, 0, 2, 0, 1, 0, 2]
    cache = KVCache(torch.arange(max(padding)) < torch.tensor(padding)[:, None])  # columns behind its end are real
    found = torch.cat([bank(ids, ROWS, cache) for ids in IDS.split([4, 1, 1, 1], dim=1)], dim=1)
    for row, (name, pad) in enumerate(zip(ROWS, padding, strict=True)):
        assert_rows(found[row : row + 1, pad:], [name], ids=IDS[row : row + 1, pad:])


@pytest.mark.parametrize("settings", [{}, dict(eos_id=5), dict(temperature=1.0, top_k=8, seed=2)], ids=str)
def test_ragged_prompts_continue_as_each_alone(bank, settings):
    prompts = [row[: 1 + number % 5].tolist() for number, row in enumerate(IDS)]
    found = bank.generate(prompts, ROWS, 12, **settings)
    assert len({len(row) for row in found}) > 1 or "eos_id" not in settings, "the rows must stop at different places"
    for row, name in enumerate(ROWS):  # all prompts, because a row draws by its place in the batch
        expected = generate(alone(ADAPTERS[name] if name else None), prompts, 12, **settings)[row]
        assert found[row] == expected, f"row {row} ({name})"
    assert bank.generate([], []) == []


def test_with_gradients_the_graph_is_whole_and_nothing_is_overwritten(bank):
    seen = []
    for layer in bank.layers.values():
        layer.base_layer.register_forward_hook(lambda _, x, y: seen.append((x[0], x[0].clone(), y, y.clone())))
    x = torch.randn(len(ROWS), 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    weights = torch.linspace(-1, 1, VOCABULARY).double()
    with bank.rows(ROWS) as model:
        got = model.lm_head(model.model.run_blocks(x))
        assert seen and all(torch.equal(x, x_then) and torch.equal(y, y_then) for x, x_then, y, y_then in seen), (
            "an input or output of a base layer was overwritten"
        )
        seen.clear()
        with torch.no_grad():  # here a base layer's output may be written to, its input never
            model.model.run_blocks(x)
        assert seen and all(torch.equal(x, x_then) for x, x_then, *_ in seen), (
            "an input of a base layer was overwritten"
        )
    (got,) = torch.autograd.grad((got @ weights).sum(), x)
    for row, name in enumerate(ROWS):
        single = alone(ADAPTERS[name] if name else None)
        expected = single.lm_head(single.model.run_blocks(x[row : row + 1]))
        (expected,) = torch.autograd.grad((expected @ weights).sum(), x)
        torch.testing.assert_close(got[row], expected[row], rtol=1e-9, atol=1e-10, msg=lambda m, row=row: f"{row}: {m}")


# Ranks, and DoRA's norms


def test_only_the_ranks_in_the_batch_are_computed(bank):
    """The largest rank among all that are resident costs nothing where no row has it, nor does a row without any."""
    bank(IDS, ROWS)  # all of them into their slots

    def work(name: str) -> int:
        layer = bank.layers[f"model.layers.0.{name}"]
        products = ([] if layer.rows is None else [layer.rows]) + ([] if layer.rest is None else [layer.rest[1:]])
        assert all(len(A) and A.shape[1] for A, _ in products), f"an empty product in {name}"
        return sum(len(A) * A.shape[1] for A, _ in products)

    for names, q, down in (
        (["few", None, "one"], 2, 0),
        (["stable", "few", None], 2, 3),
        (["dora", "few", None], 3 * 2 + 6, 8),
        (["all", "few", "few"], 3 * 5, 5),  # at half the work and more, one product
    ):
        with bank.rows(names):
            found = work("self_attn.q_proj"), work("mlp.down_proj")
        assert found == (q, down), f"{names}: rows times ranks in q_proj and down_proj are {found}, not {(q, down)}"


@pytest.mark.parametrize(
    ("ranks", "common"),
    [([8] * 16, 8), ([8] * 15 + [64], 8), ([0] * 15 + [8], 0), ([8, 16] * 8, 16), ([1, 64], 64), ([0, 0], 0), ([], 0)],
)
def test_rows_are_computed_together_up_to_the_rank_that_at_least_halves_the_work(ranks, common):
    assert common_rank(ranks) == common


def test_a_row_of_a_large_rank_stands_among_small_ones():
    adapters = {"wide": random_adapter(9, r=8, target_modules="all-linear"), "one": ADAPTERS["one"]}
    names = ["one", "one", "wide", None, "one", None, "wide", "one", None]
    bank = AdapterBank(base(), adapters)
    assert_rows(bank(IDS, names), names, adapters=adapters)
    x = IDS[:, :1]
    assert_rows(bank(x, names), names, adapters=adapters, ids=x)
    assert bank.generate([[1], [2, 3], [4]], ["one", "wide", None], 5) == [
        generate(alone(adapters.get(name)), [text], 5)[0]
        for name, text in (("one", [1]), ("wide", [2, 3]), (None, [4]))
    ]


def test_rows_are_scaled_only_beside_one_of_dora(bank):
    bank(IDS, ROWS)
    for names, wanted in ((["dora", "few", None], True), (["all", "few", None], False)):
        with bank.rows(names):
            found = {layer.row_g is not None for name, layer in bank.layers.items() if name != "lm_head"}
        assert found == {wanted}, f"{names}: layers are scaled: {found}"


@pytest.mark.parametrize("quantized", [False, True])
def test_the_norms_of_an_adapted_weight_are_those_of_its_rows(quantized):
    model = quantize_model(base(), Quantization(block_size=16)) if quantized else base()
    adapter, name = ADAPTERS["dora"], "model.layers.1.mlp.gate_proj"
    s, A, B, layer = adapter.scaling(name), adapter.A[name], adapter.B[name], model.get_submodule(name)
    W = layer(torch.eye(16, dtype=torch.float64)).T
    expected = (W + s * B @ A).pow(2).sum(1).sqrt()
    torch.testing.assert_close(norms(layer, A, s * B.T), expected, rtol=1e-12, atol=0)


def test_dora_s_row_of_zeros_is_no_number_divided_by_zero():
    def pruned():
        model, layer = base(), "model.layers.1.mlp.gate_proj"
        with torch.no_grad():
            model.get_submodule(layer).weight[1] = 0
        return model

    adapter = extract_adapter(apply_lora(pruned(), LoRAConfig(**CONFIGS["dora"])))
    found, expected = AdapterBank(pruned(), {"pruned": adapter})(IDS[:2], ["pruned", None]), pruned()(IDS[:2])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# Soft prompts and prefixes


@pytest.mark.parametrize(("kind", "tolerance"), [("float64", 1e-10), ("float32, biased", 1e-5), ("4 bits", 1e-7)])
def test_rows_with_prompts_stand_beside_any_others(kind, tolerance):
    model = base(torch.float32, attention_bias=True) if "biased" in kind else base()
    if kind == "4 bits":
        quantize_model(model, Quantization(block_size=16))
    found = AdapterBank(copy.deepcopy(model), EVERY)(IDS, PROMPTED)
    assert_rows(found, PROMPTED, model, tolerance=tolerance)
    change = (found - logits(model)).abs().amax((1, 2)).tolist()
    assert all(change[row] > 0.01 for row, name in enumerate(PROMPTED) if name), (
        f"an adapter that does little: {change}"
    )


def test_a_batch_of_prompts_alone_begins_where_the_longest_does():
    bank = AdapterBank(base(), PROMPTS)
    for names, longest in ((["soft"] * 9, 3), (["short", "prefix", "soft"] * 3, 5)):
        cache = bank.new_cache(names)
        assert len(cache) == longest and bank.new_cache([None, None]).padding is None
        assert_rows(bank(IDS, names, cache), names)
        assert_rows(bank(IDS, names), names)


@pytest.mark.parametrize("settings", [{}, dict(eos_id=5), dict(temperature=1.0, top_k=8, seed=2)], ids=str)
@pytest.mark.parametrize("quantized", [False, True])
def test_ragged_prompts_behind_virtual_tokens_continue_as_each_alone(settings, quantized):
    model = quantize_model(base(), Quantization(block_size=16)) if quantized else base()
    texts = [row[: 1 + 3 * number % 5].tolist() for number, row in enumerate(IDS)]
    found = AdapterBank(copy.deepcopy(model), EVERY).generate(texts, PROMPTED, 12, **settings)
    for row, name in enumerate(PROMPTED):
        expected = generate(alone(EVERY.get(name or ""), model), texts, 12, **settings)[row]
        assert found[row] == expected, f"row {row} ({name})"


def test_each_row_has_the_room_that_it_has_alone():
    """The longest prompt stands beside the longest text: together they have more columns than the model positions."""
    bank = AdapterBank(base(), EVERY)
    texts, names = [[3], [1] * (LIMIT - 4), [2] * (LIMIT - 5 - 4)], ["prefix", "few", "prefix"]
    for row, tokens in enumerate(bank.generate(texts, names, 4)):
        assert tokens == generate(alone(EVERY[names[row]]), [texts[row]], 4)[0], f"row {row} ({names[row]})"
    with pytest.raises(ValueError, match=f"prompt 2 has {LIMIT - 8} tokens .* sequences end at {LIMIT - 5}"):
        bank.generate([*texts[:2], texts[2] + [1]], names, 4)
    with pytest.raises(ValueError, match="longer than the model's"):
        bank(torch.ones(2, LIMIT - 4, dtype=torch.int64), ["prefix", None])


def test_adapters_and_prompts_take_each_other_s_names():
    bank = AdapterBank(base(), {"a": ADAPTERS["few"], "b": PROMPTS["soft"]})
    for a, b in (("soft", "few"), ("prefix", "dora"), ("all", "soft")):
        bank(IDS, ["a", "b", None] * 3)
        bank.add("a", EVERY[a]), bank.add("b", EVERY[b])
        assert_rows(bank(IDS, ["a", "b", None] * 3), [a, b, None] * 3)
    bank.remove("b")
    assert bank.names == ["a"] and bank.virtual_tokens("b") == 0
    with pytest.raises(ValueError, match="no adapter 'b'"):
        bank(IDS[:1], ["b"])


def test_a_prompt_that_goes_while_another_thread_looks_at_it_is_none():
    class Leaving(dict):
        def __contains__(self, name):
            return super().__contains__(name) and (self.clear() or True)

    bank = AdapterBank(base(), PROMPTS)
    bank.prompts = Leaving(bank.prompts)
    assert bank.virtual_tokens("soft") in (0, 3)


def test_a_prompt_keeps_the_numbers_that_it_had_and_needs_no_slot():
    prompt = random_prompt(7, SoftPrompt, 3)
    bank = AdapterBank(base(), ADAPTERS | {"prompt": prompt, **PROMPTS}, slots=1)
    names = ["few", "prompt", "prefix", "soft", "few", None, "short", "prompt", None]
    expected = bank(IDS, names)
    assert_rows(expected, names, adapters=EVERY | {"prompt": prompt})
    nn.init.zeros_(prompt.prompt_embeddings)
    assert torch.equal(bank(IDS, names), expected), "the prompt changed after it was added"


def test_a_prompt_that_comes_while_a_batch_runs_disturbs_nothing(bank):
    with bank.rows(ROWS) as model:
        expected = logits(model)
        bank.add("soft", PROMPTS["soft"])  # which takes a pass through the base
        assert torch.equal(logits(model), expected), "the rows of the batch under way lost their adapters"
    assert_rows(bank(IDS, ["soft", "few", None] * 3), ["soft", "few", None] * 3)


# Adapters that come, go and wait


def test_add_replace_and_remove_act_at_once():
    bank, adapters = AdapterBank(base(), {"a": ADAPTERS["few"]}), {"a": ADAPTERS["few"]}
    assert_rows(bank(IDS, ["a"] * 9), ["a"] * 9, adapters=adapters)
    for settings in (
        dict(r=7, target_modules=["down_proj", "q_proj"]),  # a larger rank than any before, and a new layer
        dict(r=1, target_modules=["v_proj"]),  # the same name with a smaller one, and fewer layers
    ):
        adapters["b"] = random_adapter(8, **settings)
        bank.add("b", adapters["b"])
        assert_rows(bank(IDS, ["a", "b", None] * 3), ["a", "b", None] * 3, adapters=adapters)
    bank.remove("a")
    assert set(bank.resident) == {"b"}
    bank.add("c", adapters.setdefault("c", ADAPTERS["stable"]))  # takes the slot that a left
    assert bank.names == ["b", "c"]
    assert_rows(bank(IDS, ["c", "b", None] * 3), ["c", "b", None] * 3, adapters=adapters)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_paging_serves_more_adapters_than_slots(slots):
    bank, used, draw = AdapterBank(base(), ADAPTERS, slots=slots), {}, random.Random(slots)
    expected = {name: logits(alone(adapter)) for name, adapter in ADAPTERS.items()} | {None: logits(base())}
    for batch in range(40):
        names = draw.choices([None, *draw.sample(list(ADAPTERS), draw.randint(1, slots))], k=len(ROWS))
        found = bank(IDS, names)
        for row, name in enumerate(names):
            error = (found[row] - expected[name][row]).abs().max().item()
            assert error < 1e-9, f"batch {batch}, row {row} ({name}): off by {error:.1e}"
        used |= dict.fromkeys((name for name in names if name), batch)
        there, gone = ({n: b for n, b in used.items() if (n in bank.resident) == kept} for kept in (True, False))
        assert len(there) == len(bank.resident) == min(slots, len(used)), "a slot is empty, or an adapter unused"
        assert min(there.values(), default=0) >= max(gone.values(), default=0), f"last used: {there}, evicted: {gone}"


# Folders


def test_folders_are_read_and_another_base_is_refused(tmp_path):
    for name, seed in (("few", 0), ("all", 0), ("one", 1)):
        save_adapter(apply_adapter(base(seed=seed), ADAPTERS[name]), tmp_path / name)
    bank = AdapterBank(base(), {"few": tmp_path / "few", "all": str(tmp_path / "all")})
    rows = ["few", "all", None] * 3
    assert_rows(bank(IDS, rows), rows, tolerance=1e-6)  # the file is in float32, and s·B is rounded to it
    with pytest.raises(ValueError, match="was trained on another base than this model; force=True"):
        bank.add("one", tmp_path / "one")
    assert bank.names == ["few", "all"]
    bank.add("one", tmp_path / "one", force=True)
    rows = ["few", "all", "one"] * 3
    assert_rows(bank(IDS, rows), rows, tolerance=1e-6)


def test_a_folder_may_hold_any_kind(tmp_path):
    save_adapter(apply_adapter(base(), ADAPTERS["dora"]), tmp_path / "dora")
    for name in ("soft", "prefix"):
        save_prompt(alone(PROMPTS[name]), tmp_path / name)
    bank = AdapterBank(base(), {name: tmp_path / name for name in ("dora", "soft", "prefix")})
    rows = ["dora", "soft", "prefix"] * 3
    assert_rows(bank(IDS, rows), rows, tolerance=1e-6)
    with pytest.raises(ValueError, match="was trained on another base than this model; force=True"):
        AdapterBank(base(seed=1), {"soft": tmp_path / "soft"})


# Bad input


def state(bank: AdapterBank):
    """All that a refused call could have changed, but the numbers."""
    return bank.names, list(bank.resident.items()), bank.running, [type(module) for module in bank.model.modules()]


def adapter_of(layer="layers.0.self_attn.q_proj", A=(2, 16), B=(16, 2), m=()) -> Adapter:
    """Of a layer that fits and is not wrapped yet, and this one. m: of what shape the second's magnitude is, if any."""
    fits, layer = "model.layers.0.mlp.gate_proj", f"model.{layer}"
    A, B = ({fits: torch.ones(good), layer: torch.ones(own)} for good, own in (((2, 16), A), ((24, 2), B)))
    magnitude = {} if m == () else {fits: torch.ones(24)} if m is None else {fits: torch.ones(24), layer: torch.ones(m)}
    return Adapter(LoRAConfig(), A, B, magnitude)


def other_prompt(width=8, n=2) -> SoftPrompt:
    prompt = SoftPrompt(base(), 0)
    prompt.prompt_embeddings = nn.Parameter(torch.ones(n, width))
    return prompt


NO_NAMES = ["", "a/b", "a\\b", "..", ".", "/", None, 3, ["few"]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b(IDS[:2], ["few", "fw"]), "no adapter 'fw'; known: few, stable, one, soft"),
        (lambda b: b.generate([[1]], ["fw"]), "no adapter 'fw'; known: few, stable, one, soft"),
        (lambda b: b.remove("fw"), "no adapter 'fw'; known: few, stable, one, soft"),
        (lambda b: b(IDS[:3], ["one", "few"]), "3 rows and 2 adapters"),
        (lambda b: b.generate([[1], [2]], ["one"]), "2 prompts and 1 adapters"),
        (lambda b: b.generate([[1], []], ["few", None], 4), "prompt 1 is empty"),
        (lambda b: b.generate([[1] * 30], ["few"], 3), "prompt 0 has 30 tokens and 3 new ones are asked for.* 32"),
        (lambda b: b(IDS[:4], ["one", "few", None, "stable"]), "names 3 different adapters, and 2 can be resident"),
        *[(lambda b, name=name: b.add(name, ADAPTERS["all"]), "is not a name for an adapter") for name in NO_NAMES],
        (lambda b: b.add("few", adapter_of("layers.7.mlp.up_proj")), "has a layer model.layers.7.mlp.up_proj, which"),
        (lambda b: b.add("few", adapter_of(A=(2, 15))), r"A \(2, 15\) and B \(16, 2\) for .*q_proj of 16 to 16"),
        (lambda b: b.add("few", adapter_of(A=(3, 16))), r"A \(3, 16\) and B \(16, 2\) for .*q_proj of 16 to 16"),
        (lambda b: b.add("few", adapter_of(B=(15, 2))), r"A \(2, 16\) and B \(15, 2\) for .*q_proj of 16 to 16"),
        (lambda b: b.add("few", adapter_of(m=(17,))), r"the magnitude \(17,\) for .*q_proj of 16 to 16"),
        (lambda b: b.add("few", adapter_of(m=None)), "the magnitude None for .*q_proj of 16 to 16"),
        (lambda b: b.add("few", other_prompt()), "prompt 'few': it has 8 numbers for each virtual token.* needs 16"),
        (lambda b: b.add("few", other_prompt(16, LIMIT)), "prompt 'few': length is 32; .* 32 positions .* 0 to 31"),
        (lambda b: b.rows(["soft"]).__enter__(), "'soft' is a prompt, .* use forward or generate"),
        (lambda b: b(IDS[:2], ["soft", "few"], KVCache()), "does not begin with the prompts of 3 columns"),
        (lambda b: b.generate([[1] * 25], ["soft"], 5), "prompt 0 has 25 tokens and 5 new ones .* end at 29"),
        (lambda b: b.add("new", __file__), "test_bank.py is a file, not a folder"),
        (lambda b: b.add("few", "no/such/folder"), "no/such/folder is not a folder"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call, message):
    bank = AdapterBank(base(), {name: EVERY[name] for name in ("few", "stable", "one", "soft")}, slots=2)
    bank(IDS[:2], ["stable", "few"])
    before = state(bank)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        call(bank)
    assert "\n" not in str(error.value)
    assert state(bank) == before
    assert_rows(bank(IDS, ["stable", "few", None] * 3), ["stable", "few", None] * 3)


def test_a_batch_under_way_is_not_disturbed(bank):
    expected = bank(IDS, ROWS)
    with bank.rows(ROWS) as model:
        before = state(bank)
        for call, message in (
            (lambda: bank.remove("few"), "'few' is in use by the batch under way"),
            (lambda: bank.add("few", ADAPTERS["all"]), "'few' is in use by the batch under way"),
            (lambda: bank.rows(["one"]).__enter__(), "a batch is under way"),
            (lambda: bank(IDS[:1], ["few"]), "a batch is under way"),
            (lambda: bank.generate([[1]], [None], 4), "a batch is under way"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
            assert state(bank) == before
        bank.add("new", ADAPTERS["all"])  # one that the batch does not use may come and go
        bank.remove("new")
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("slots", [0, -1, 2.0, True, None])
def test_slots_below_one_and_a_model_with_lora_layers_are_refused(slots):
    model = base()
    with pytest.raises(ValueError, match=f"slots is {slots}; at least 1 adapter must be resident"):
        AdapterBank(model, ADAPTERS, slots=slots)
    assert not any(isinstance(module, BankedLinear) for module in model.modules())
    with pytest.raises(ValueError, match="the model has LoRA layers; a bank needs the plain base"):
        AdapterBank(alone(ADAPTERS["few"]), {})


def test_a_bank_gives_the_model_back():
    """By close(), and when it could not be made; two banks on one model would wrap each other's layers."""
    model = base()
    plain, modules = logits(model), [type(module) for module in model.modules()]
    bank = AdapterBank(model, ADAPTERS)
    with pytest.raises(ValueError, match="another bank"):
        AdapterBank(model, ADAPTERS)
    bank.close()
    assert bank.names == [] and [type(module) for module in model.modules()] == modules
    with pytest.raises(ValueError, match="does not have"):
        AdapterBank(model, {"good": next(iter(ADAPTERS.values())), "bad": adapter_of("nowhere")})
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(logits(model), plain), (
        f"the model should be the base again, and differs by up to {(logits(model) - plain).abs().max():.3g}"
    )


def test_an_adapter_with_half_a_layer_is_refused(bank):
    whole = adapter_of()
    for half in (Adapter(whole.config, whole.A, {}), Adapter(whole.config, {}, whole.B)):
        with pytest.raises(ValueError, match="None"):
            bank.add("half", half)
    assert "half" not in bank.names


def test_the_bank_s_stacks_move_with_the_model_and_are_not_saved_with_it(bank):
    names = {name for name, _ in bank.model.named_buffers()}
    assert any(name.endswith(".A") for name in names)
    assert not [name for name in bank.model.state_dict() if name.endswith((".A", ".B"))]
