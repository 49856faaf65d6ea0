"""Many adapters in one batch, held against each of them alone on a copy of the base."""

import copy
import random

import pytest
import torch

from minilora.adapters.adapter import Adapter, apply_adapter, extract_adapter
from minilora.adapters.inject import adapter_parameters, apply_lora
from minilora.config import LoRAConfig
from minilora.inference.bank import AdapterBank, BankedLinear
from minilora.inference.generate import generate
from minilora.linear4bit import quantize_model
from minilora.model import GPT, GPTConfig, KVCache
from minilora.quant import Quantization
from minilora.storage.adapters import save_adapter

VOCABULARY, LIMIT = 24, 32
PATTERNS = dict(rank_pattern={"layers.0.self_attn.o_proj": 4}, alpha_pattern={"up_proj": 1})
CONFIGS = {
    "few": dict(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"]),
    "all": dict(r=5, lora_alpha=4, target_modules="all-linear"),
    "stable": dict(r=3, lora_alpha=2, target_modules=["down_proj"], use_rslora=True),
    "one": dict(r=1, lora_alpha=1, target_modules=r"model\.layers\.1\.mlp\.up_proj"),
    "head": dict(r=2, lora_alpha=2, target_modules=["lm_head", "k_proj"]),
    "patterns": dict(r=2, lora_alpha=5, target_modules=["o_proj", "up_proj"], **PATTERNS),
}
ROWS = ["few", None, "patterns", "all", "few", "one", None, "stable", "head"]


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


def random_adapter(seed: int, **settings) -> Adapter:
    """Random A and B; their values are float32's, so a file loses nothing."""
    model = apply_lora(base(), LoRAConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return extract_adapter(model)


ADAPTERS = {name: random_adapter(seed, **config) for seed, (name, config) in enumerate(CONFIGS.items())}
IDS = torch.randint(VOCABULARY, (len(ROWS), 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def bank() -> AdapterBank:
    return AdapterBank(base(), ADAPTERS)


def alone(adapter: Adapter | None, model: GPT | None = None) -> GPT:
    """The reference: a model of its own for one adapter."""
    model = copy.deepcopy(model or base())
    return (model if adapter is None else apply_adapter(model, adapter)).eval()


def logits(model: GPT, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids)


def assert_rows(found, names, model: GPT | None = None, adapters=ADAPTERS, ids=IDS, tolerance=1e-10):
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
    # In bfloat16 the bank rounds s·B, the reference B: they differ as much as two roundings of the same model.
    assert_rows(found, ROWS, model, tolerance=1e-10 if quantized else 0.04)


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


# Bad input


def state(bank: AdapterBank):
    """All that a refused call could have changed, but the numbers."""
    return bank.names, list(bank.resident.items()), bank.running, [type(module) for module in bank.model.modules()]


def adapter_of(layer="layers.0.self_attn.q_proj", A=(2, 16), B=(16, 2)) -> Adapter:
    """Of a layer that fits and is not wrapped yet, and this one."""
    fits, layer = "model.layers.0.mlp.gate_proj", f"model.{layer}"
    A, B = ({fits: torch.ones(good), layer: torch.ones(own)} for good, own in (((2, 16), A), ((24, 2), B)))
    return Adapter(LoRAConfig(), A, B)


NO_NAMES = ["", "a/b", "a\\b", "..", ".", "/", None, 3, ["few"]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b(IDS[:2], ["few", "fw"]), "no adapter 'fw'; known: few, stable, one"),
        (lambda b: b.generate([[1]], ["fw"]), "no adapter 'fw'; known: few, stable, one"),
        (lambda b: b.remove("fw"), "no adapter 'fw'; known: few, stable, one"),
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
        (lambda b: b.add("new", __file__), "test_bank.py is a file, not a folder"),
        (lambda b: b.add("few", "no/such/folder"), "no/such/folder is not a folder"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call, message):
    bank = AdapterBank(base(), {name: ADAPTERS[name] for name in ("few", "stable", "one")}, slots=2)
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
