"""Switching adapters on one base: each is what it is alone, the base is never touched, and nothing else is either."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.adapters.adapter import Adapter, apply_adapter, extract_adapter
from minilora.adapters.inject import adapter_parameters, apply_lora, disable_lora, lora_layers, merge_lora, unmerge_lora
from minilora.adapters.swap import AdapterShelf
from minilora.config import LoRAConfig
from minilora.linear4bit import quantize_model, quantized_layers
from minilora.lora import LoRALinear
from minilora.model import GPT, GPTConfig
from minilora.storage.adapters import load_adapter, save_adapter

IDS = torch.arange(24).view(2, 12)
CONFIGS = {  # other targets, ranks and scalings
    "english": LoRAConfig(2, 3, 0.5, ["q_proj", "v_proj"]),
    "code": LoRAConfig(3, 5, 0.0, ["v_proj", "down_proj"], True, {"down_proj": 1}, {r"layers\.1\.mlp\.down_proj": 7}),
    "chess": LoRAConfig(1, 1, 0.0, "all-linear"),
}
ORDER = ["english", "chess", None, "code", "english", "code", None, None, "chess", "chess", "english"]


def make_model(kind="float64"):
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = GPT(GPTConfig(vocab_size=32, max_position_embeddings=16, **shape)).eval()
    return quantize_model(model) if kind == "4 bits" else model.to(getattr(torch, kind))


def make_adapter(name, kind="float64"):
    model, generator = apply_lora(make_model(kind), CONFIGS[name]), torch.Generator().manual_seed(len(name))
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return extract_adapter(model)


def make_shelf(kind="float64"):
    shelf = AdapterShelf(make_model(kind))
    for name in CONFIGS:
        shelf.add(name, make_adapter(name, kind))
    return shelf


def logits(model):
    with torch.no_grad():
        return model(IDS)


def outputs_alone(kind="float64"):
    """By name, the logits of a model that has this adapter and never had another."""
    alone = {name: logits(apply_adapter(make_model(kind), make_adapter(name, kind))) for name in CONFIGS}
    return alone | {None: logits(make_model(kind))}


def tensors_of(adapter):
    return {(name, part): tensors[name] for part, tensors in (("A", adapter.A), ("B", adapter.B)) for name in tensors}


def active_tensors(shelf, name):
    shelf.switch(name)
    return tensors_of(extract_adapter(shelf.model))


def base_tensors(model):
    """Name -> tensor of everything but A and B, under the names of the plain base."""
    state = model.state_dict(keep_vars=True)
    tensors = {name: tensor for name, tensor in state.items() if torch.is_tensor(tensor)}
    return {n.replace(".base_layer", ""): t for n, t in tensors.items() if not n.endswith(("lora_A", "lora_B"))}


# Switching


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "4 bits"])
def test_every_adapter_is_bit_for_bit_what_it_is_alone(kind):
    shelf, expected = make_shelf(kind), outputs_alone(kind)
    assert shelf.names == list(CONFIGS) and shelf.active is None
    for i, name in enumerate(ORDER):
        shelf.switch(name)
        assert shelf.active == name
        assert torch.equal(logits(shelf.model), expected[name]), f"{name!r} differs after {ORDER[:i]}"
    assert len({output.sum().item() for output in expected.values()}) == 4, "the adapters should differ"
    assert bool(quantized_layers(shelf.model)) == (kind == "4 bits")


@pytest.mark.parametrize("kind", ["float64", "4 bits"])
def test_with_none_active_the_model_is_the_plain_base(kind):
    model = make_model(kind)
    modules, attributes = dict(model.named_modules()), set(vars(model))
    shelf = AdapterShelf(model)
    for name in CONFIGS:
        shelf.add(name, make_adapter(name, kind))
    for name in ("code", None, "chess", "english", None):
        shelf.switch(name)
    assert dict(model.named_modules()) == modules and not any(lora_layers(model))
    assert set(vars(model)) == attributes, set(vars(model)) ^ attributes
    apply_lora(model, LoRAConfig(target_modules=["q_proj"]))  # takes it for a plain model


@pytest.mark.parametrize("kind", ["float64", "4 bits"])
def test_the_base_is_never_copied_nor_written(kind):
    model = make_model(kind)
    before = base_tensors(model)
    values = {name: tensor.detach().clone() for name, tensor in before.items()}
    places = {name: tensor.data_ptr() for name, tensor in before.items()}
    shelf = AdapterShelf(model)
    for name in CONFIGS:
        shelf.add(name, make_adapter(name, kind))
    for name in ORDER:
        shelf.switch(name)
        now = base_tensors(model)
        assert now.keys() == before.keys()
        for key, tensor in now.items():
            assert tensor is before[key] and tensor.data_ptr() == places[key], f"{key} is another tensor with {name!r}"
            assert torch.equal(tensor, values[key]), f"{key} changed with {name!r}"


def test_to_switch_takes_no_operation_on_any_tensor():
    shelf, seen = make_shelf(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        for name in ORDER:
            shelf.switch(name)
    assert not seen, f"{len(seen)} operations, the first is {seen[0]}"


def test_the_model_has_the_layers_and_the_config_of_the_active_adapter():
    shelf = make_shelf()
    for name in ORDER:
        shelf.switch(name)
        wanted = dict(lora_layers(apply_lora(make_model(), CONFIGS[name]))) if name else {}
        found = dict(lora_layers(shelf.model))
        assert found.keys() == wanted.keys()
        for key, layer in found.items():
            for field in ("r", "lora_alpha", "lora_dropout", "scaling", "enabled"):
                value, meant = getattr(layer, field), getattr(wanted[key], field)
                assert value == meant, f"with {name!r} active, {field} of {key} is {value}, and its config says {meant}"
        found, wanted = getattr(shelf.model, "lora_config", None), CONFIGS.get(name)
        if wanted:  # whose layers the shelf lists by name
            wanted = replace(wanted, target_modules=found.target_modules)
        assert found == wanted, f"with {name!r} active the config is {found}, expected {wanted}"


def test_only_the_active_adapter_can_be_trained():
    shelf = make_shelf()
    assert not any(parameter.requires_grad for parameter in shelf.model.parameters()), "apply_lora freezes the base"
    for name in ORDER:
        shelf.switch(name)
        for key, parameter in shelf.model.named_parameters():
            assert parameter.requires_grad == key.endswith(("lora_A", "lora_B")), f"{key} with {name!r}"


# Around the model


def test_adding_and_removing_beside_an_active_adapter_leaves_the_model_alone():
    shelf, adapter = AdapterShelf(make_model()), make_adapter("code")
    shelf.add("code", adapter)
    assert not any(lora_layers(shelf.model)), "an adapter that is only added must not act"
    shelf.switch("code")
    modules, expected = dict(shelf.model.named_modules()), logits(shelf.model)
    shelf.add("chess", make_adapter("chess"))
    adapter.A.clear()
    shelf.add("code 2", make_adapter("code"))
    shelf.remove("chess")
    assert dict(shelf.model.named_modules()) == modules and torch.equal(logits(shelf.model), expected)
    assert shelf.names == ["code", "code 2"] and shelf.active == "code"
    shelf.add("chess", make_adapter("chess"))
    for name in ("chess", None, "code 2"):
        shelf.switch(name)
        assert torch.equal(logits(shelf.model), outputs_alone()[name and name.removesuffix(" 2")]), name


def test_the_adapter_is_copied():
    adapter = make_adapter("code")
    shelf = AdapterShelf(make_model())
    shelf.add("code", adapter)
    adapter.config.lora_alpha = 100
    for tensor in tensors_of(adapter).values():
        tensor.zero_()
    shelf.switch("code")
    assert torch.equal(logits(shelf.model), outputs_alone()["code"]) and shelf.model.lora_config == CONFIGS["code"]


def train_a_little(model, steps=3):
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["float64", "4 bits"])
def test_training_moves_the_active_adapter_and_no_other(kind):
    shelf, alone = make_shelf(kind), apply_adapter(make_model(kind), make_adapter("code", kind))
    before = {name: active_tensors(shelf, name) for name in shelf.names}
    shelf.switch("code")
    train_a_little(shelf.model)
    train_a_little(alone)
    trained = logits(alone)
    assert torch.equal(logits(shelf.model), trained), "training should go as it does without a shelf"
    for name in ("english", "chess"):
        for key, tensor in active_tensors(shelf, name).items():
            assert torch.equal(tensor, before[name][key]), f"{key} of {name!r} moved"
    for key, tensor in active_tensors(shelf, "code").items():
        assert not torch.equal(tensor, before["code"][key]), f"{key} did not move"
    assert torch.equal(logits(shelf.model), trained), "what was trained should be there after a switch"


def test_an_optimizer_goes_on_after_a_switch_back():
    shelf = make_shelf()
    shelf.switch("code")
    parameters = adapter_parameters(shelf.model)
    shelf.switch("chess")
    shelf.switch("code")
    assert all(a is b for a, b in zip(adapter_parameters(shelf.model), parameters, strict=True))


def test_the_active_adapter_is_saved_and_loaded(tmp_path):
    shelf = make_shelf("float32")
    for name in CONFIGS:
        shelf.switch(name)
        save_adapter(shelf.model, tmp_path / name)
        loaded = load_adapter(make_model("float32"), tmp_path / name)
        assert torch.equal(logits(loaded), logits(shelf.model)), name
    shelf.switch("code")
    expected = logits(shelf.model)
    train_a_little(shelf.model)
    load_adapter(shelf.model, tmp_path / "code")  # fills the layers that stand in the model
    assert torch.equal(logits(shelf.model), expected)
    with pytest.raises(ValueError, match="another config"):
        load_adapter(shelf.model, tmp_path / "chess")


def test_a_merged_adapter_is_not_switched_away():
    shelf, expected = make_shelf(), outputs_alone()
    shelf.switch("code")
    merge_lora(shelf.model)
    merged = logits(shelf.model)
    torch.testing.assert_close(merged, expected["code"])
    for name in ("chess", None, "code"):
        with pytest.raises(ValueError, match="adapter 'code' is merged into the base; unmerge_lora"):
            shelf.switch(name)
    assert shelf.active == "code" and torch.equal(logits(shelf.model), merged)
    unmerge_lora(shelf.model)
    shelf.switch("chess")
    assert torch.equal(logits(shelf.model), expected["chess"])


def test_disabled_is_the_base_and_the_next_switch_is_enabled():
    shelf, expected = make_shelf(), outputs_alone()
    shelf.switch("code")
    with disable_lora(shelf.model):
        assert torch.equal(logits(shelf.model), expected[None])
    for name in ("chess", "code"):
        shelf.switch(name)
        assert torch.equal(logits(shelf.model), expected[name])


@pytest.mark.parametrize("during", [None, "code", "english"])
def test_an_adapter_off_the_model_follows_it_from_training_to_evaluation_and_back(during):
    shelf = make_shelf()
    for mode in (True, False, True):
        shelf.switch(during)
        shelf.model.train(mode)
        shelf.switch("english")  # the one with dropout
        wrong = [name for name, module in shelf.model.named_modules() if module.training != mode]
        assert not wrong, f"{wrong} should have training={mode}"
        assert torch.equal(logits(shelf.model), logits(shelf.model)) != mode, "dropout acts in training only"


@pytest.mark.parametrize("kind", ["float64", "4 bits"])
@pytest.mark.parametrize("during", [None, "code"])
def test_an_adapter_off_the_model_follows_it_to_another_device(kind, during):
    shelf = make_shelf(kind)
    shelf.switch(during)
    shelf.model.to("meta")
    shelf.switch("chess")
    devices = {name: parameter.device.type for name, parameter in shelf.model.named_parameters()}
    assert set(devices.values()) == {"meta"}, devices


# Bad input


@pytest.mark.parametrize("name", ["", None, 3, ("a",)], ids=str)
def test_a_name_must_be_a_string_that_is_not_empty(name):
    shelf = make_shelf()
    with pytest.raises(ValueError, match="is not a name for an adapter"):
        shelf.add(name, make_adapter("code"))
    assert shelf.names == list(CONFIGS)


def test_names_taken_unknown_and_active_are_refused():
    shelf, expected = make_shelf(), outputs_alone()
    shelf.switch("code")
    with pytest.raises(ValueError, match="there already is an adapter 'code'"):
        shelf.add("code", make_adapter("chess"))
    for call in (shelf.switch, shelf.remove):
        with pytest.raises(ValueError, match="there is no adapter 'cod'; known: english, code, chess"):
            call("cod")
    with pytest.raises(ValueError, match="known: none"):
        AdapterShelf(make_model()).switch("code")
    with pytest.raises(ValueError, match="adapter 'code' is active; switch to another"):
        shelf.remove("code")
    assert shelf.names == list(CONFIGS) and shelf.active == "code"
    assert torch.equal(logits(shelf.model), expected["code"])


def test_a_model_with_lora_layers_is_refused_and_not_frozen():
    model = apply_lora(make_model(), CONFIGS["code"])
    with pytest.raises(ValueError, match="already has LoRA layers"):
        AdapterShelf(model)
    assert all(parameter.requires_grad for parameter in adapter_parameters(model))


Q = "model.layers.1.self_attn.q_proj"


def cut(tensors, name=Q):
    return {key: tensor[:, :-1] if key == name else tensor for key, tensor in tensors.items()}


def without(tensors, name=Q):
    return {key: tensor for key, tensor in tensors.items() if key != name}


def renamed(tensors, name=Q):
    return {key.replace("layers.1", "layers.7") if key == name else key: t for key, t in tensors.items()}


def of_three(config, A, B):
    third = {"model.layers.0.mlp.up_proj": A["model.layers.0.self_attn.q_proj"]}
    return Adapter(config, A | third, B | {name: torch.zeros(24, 2) for name in third})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, A, B: Adapter(c, cut(A), B), rf"{Q} needs a lora_A of shape \(2, 16\); .* \(2, 15\)"),
        (lambda c, A, B: Adapter(c, A, cut(B)), rf"{Q} needs a lora_B of shape \(16, 2\); .* \(16, 1\)"),
        (
            lambda c, A, B: Adapter(LoRAConfig(3, 3, 0.0, c.target_modules), A, B),
            r"needs a lora_A of shape \(3, 16\); .* \(2, 16\)",
        ),
        (lambda c, A, B: Adapter(c, renamed(A), renamed(B)), r"a layer model\.layers\.7\.self_attn\.q_proj, which the"),
        (lambda c, A, B: Adapter(c, without(A), without(B)), f"{Q} must be among its target_modules, with A and B"),
        (lambda c, A, B: Adapter(c, A, without(B)), f"{Q} must be among its target_modules, with A and B"),
        (of_three, r"model\.layers\.0\.mlp\.up_proj must be among its target_modules"),
        (lambda c, A, B: Adapter(LoRAConfig(2, 3, 0.0, ["query"]), A, B), "'query' matches no layer"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_layer_and_changes_nothing(change, message):
    shelf, expected = make_shelf(), outputs_alone()
    shelf.switch("code")
    modules, adapter = dict(shelf.model.named_modules()), make_adapter("english")
    with pytest.raises(ValueError, match=message):
        shelf.add("new", change(copy.deepcopy(adapter.config), adapter.A, adapter.B))
    assert shelf.names == list(CONFIGS) and dict(shelf.model.named_modules()) == modules
    assert torch.equal(logits(shelf.model), expected["code"])
    shelf.add("new", adapter)  # the name is still free


def test_any_model_with_linear_layers_will_do():
    torch.manual_seed(0)
    model, config = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), LoRAConfig(2, 2, 0.0, ["0", "2"])
    x, shelf = torch.randn(6, 4), AdapterShelf(model)
    adapter = Adapter(
        config,
        {"0": torch.randn(2, 4), "2": torch.randn(2, 5)},
        {"0": torch.randn(5, 2), "2": torch.randn(3, 2)},
    )
    expected = apply_adapter(copy.deepcopy(model), adapter)(x)
    shelf.add("a", adapter)
    shelf.switch("a")
    assert torch.equal(model(x), expected) and isinstance(model[0], LoRALinear) and len(model) == 3
