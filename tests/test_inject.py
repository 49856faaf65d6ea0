"""From a layer to a model: names, freezing, merging, disabling, counting. A and B are random, numbers float64."""

import re

import pytest
import torch
from torch import nn

from minilora.adapters.inject import (
    adapter_parameters,
    apply_lora,
    count_parameters,
    disable_lora,
    lora_layers,
    merge_lora,
    print_trainable_parameters,
    train_adapter_only,
    unmerge_lora,
)
from minilora.config import LoRAConfig
from minilora.lora import LoRALinear
from minilora.model import GPT, GPTConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(24).view(2, 12)  # 24 tokens: more than the width of 16, so that weights are formed


def make_model(tied=False, dtype=torch.float64):
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return GPT(GPTConfig(vocab_size=32, max_position_embeddings=16, tie_word_embeddings=tied, **shape)).to(dtype)


def make_lora_model(**options):
    model = apply_lora(make_model(), LoRAConfig(**{"r": 2, "lora_alpha": 3, **options}))
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def names_of(model):
    return [name for name, _ in lora_layers(model)]


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["q_proj", "v_proj"], ["q_proj", "v_proj"] * 2),
        (("mlp.up_proj",), ["up_proj"] * 2),
        (["model.layers.1.self_attn.k_proj"], ["k_proj"]),
        (["lm_head"], ["lm_head"]),
        (r".*layers\.0\.self_attn\.[qk]_proj", ["q_proj", "k_proj"]),
        ("all-linear", LINEARS * 2),
    ],
    ids=str,
)
def test_targets_are_found_as_peft_finds_them(targets, expected):
    model = make_lora_model(target_modules=targets)
    assert [name.rpartition(".")[2] for name in names_of(model)] == expected


def test_a_suffix_begins_after_a_dot():
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "q_proj": nn.Linear(2, 2)})
    assert names_of(apply_lora(model, LoRAConfig(r=1, target_modules=["proj"]))) == ["proj"]


@pytest.mark.parametrize(
    "targets, named",
    [
        (["q_proj", "quary", "proj"], "'quary', 'proj'"),  # a suffix begins after a dot: "proj" is none
        ("q_proj", "'q_proj'"),  # one string must match the whole name
        ([], r"\[\]"),
    ],
    ids=str,
)
def test_targets_that_match_nothing_are_named_beside_what_exists(targets, named):
    model = make_model()
    with pytest.raises(ValueError, match=named) as error:
        apply_lora(model, LoRAConfig(target_modules=targets))
    assert all(name in str(error.value) for name in LINEARS + ["lm_head"]), error.value
    assert not names_of(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_only_adapters_are_trainable():
    model = make_model()
    model.model.norm.requires_grad_(False)
    apply_lora(model, LoRAConfig(target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.endswith(("lora_A", "lora_B"))), name
    names = {parameter: name for name, parameter in model.named_parameters()}
    found, expected = {names[p] for p in adapter_parameters(model)}, {names[p] for p in names if p.requires_grad}
    assert found == expected, f"adapter_parameters and what is trainable differ in {sorted(found ^ expected)}"
    assert model.lora_config.target_modules == ["q_proj"]


def test_patterns_give_single_layers_their_own_rank_and_alpha_and_the_first_match_wins():
    model = make_lora_model(
        r=2,
        lora_alpha=4,
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 5, "q_proj": 3},
        alpha_pattern={"v_proj": 10},
    )
    found = {name: (layer.r, layer.scaling) for name, layer in lora_layers(model)}
    assert found == {
        "model.layers.0.self_attn.q_proj": (5, 4 / 5),
        "model.layers.0.self_attn.v_proj": (2, 5.0),
        "model.layers.1.self_attn.q_proj": (3, 4 / 3),
        "model.layers.1.self_attn.v_proj": (2, 5.0),
    }


def test_every_option_reaches_the_layers():
    model = make_lora_model(r=4, lora_alpha=6, lora_dropout=0.25, use_rslora=True)
    for name, layer in lora_layers(model):
        found = dict(r=layer.r, lora_alpha=layer.lora_alpha, lora_dropout=layer.lora_dropout, scaling=layer.scaling)
        wanted = dict(r=4, lora_alpha=6, lora_dropout=0.25, scaling=3.0)
        off = {option: f"{found[option]}, not {value}" for option, value in wanted.items() if found[option] != value}
        assert not off, f"{name} has {off}"


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("key", ["q_prj", "up_proj", "proj"])  # a typo, a layer that gets no adapter, half a name
def test_pattern_keys_that_match_nothing_are_refused(field, key):
    with pytest.raises(ValueError, match=f"{field} key '{key}'"):
        apply_lora(make_model(), LoRAConfig(**{field: {key: 4}}))


def test_a_broken_expression_and_a_wrong_type_are_named():
    with pytest.raises(ValueError, match=r"'\(q_proj' is not a regular expression"):
        apply_lora(make_model(), LoRAConfig(target_modules="(q_proj"))
    with pytest.raises(ValueError, match=r"alpha_pattern\['v_proj'\] is '8'"):
        LoRAConfig(alpha_pattern={"v_proj": "8"})


def test_a_model_in_eval_mode_stays_in_it():
    model = apply_lora(make_model().eval(), LoRAConfig(lora_dropout=0.5))
    assert not any(module.training for module in model.modules()), "dropout would be active"


def test_a_wrapped_model_is_refused():
    with pytest.raises(ValueError, match="already has LoRA layers"):
        apply_lora(make_lora_model(), LoRAConfig())


def test_a_rank_above_the_layers_own_warns():
    with pytest.warns(UserWarning, match=r"r=17 exceeds the full rank 16 of model\.layers\.0\.self_attn\.q_proj"):
        apply_lora(make_model(), LoRAConfig(r=17, target_modules=["model.layers.0.self_attn.q_proj"]))


def test_the_model_starts_as_its_base_and_every_adapter_changes_it():
    torch.manual_seed(1)
    base = make_model()
    model = apply_lora(make_model(), LoRAConfig(target_modules="all-linear"))
    expected = base(IDS)
    torch.testing.assert_close(model(IDS), expected)
    for name, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
        assert not torch.allclose(model(IDS), expected), f"{name} has no effect"
        nn.init.zeros_(layer.lora_B)


def test_merge_keeps_the_function_and_unmerge_gives_back_the_very_weights():
    model = make_lora_model(target_modules="all-linear")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(IDS)
    merge_lora(model)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), expected)
    assert all(layer.merged for _, layer in lora_layers(model))
    unmerge_lora(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_merging_a_shared_weight_is_refused_by_name_and_changes_nothing():
    model = apply_lora(make_model(tied=True), LoRAConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"cannot merge lm_head: .* model\.embed_tokens"):
        merge_lora(model)
    assert not any(layer.merged for _, layer in lora_layers(model))


@pytest.mark.parametrize("merged", [True, False])
def test_disabled_is_the_base_model_and_the_state_comes_back_after_an_error(merged):
    expected = make_model()(IDS)
    model = make_lora_model(target_modules="all-linear")
    with_adapters = model(IDS)
    if merged:
        merge_lora(model)
    first = next(lora_layers(model))[1]
    with disable_lora(model), disable_lora(model):
        torch.testing.assert_close(model(IDS), expected)
    torch.testing.assert_close(model(IDS), with_adapters)
    first.enabled = False
    with pytest.raises(RuntimeError, match="on purpose"), disable_lora(model):
        raise RuntimeError("on purpose")
    assert [layer.enabled for _, layer in lora_layers(model)] == [False] + [True] * (len(names_of(model)) - 1)
    assert first.merged == merged


def test_a_training_step_moves_adapters_only():
    model = make_lora_model(target_modules="all-linear", lora_dropout=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.01)
    model(IDS).square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, f"{name} {'moved' if moved else 'did not move'}"
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_layers_that_only_look_linear_are_wrapped_too():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 4, 3
            self.register_buffer("codes", torch.randint(0, 16, (3, 4), dtype=torch.uint8))

        def forward(self, x):
            return x @ self.codes.to(x.dtype).T

    model = apply_lora(nn.Sequential(Quantized(), nn.Tanh()), LoRAConfig(r=2, target_modules=["0"]))
    assert isinstance(model[0], LoRALinear) and model[0].lora_A.dtype == torch.float32
    model(torch.randn(5, 4)).sum().backward()
    assert model[0].lora_B.grad.abs().max() > 0


def test_the_line_for_llama_2_7b(capsys):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("llama-2-7b"))
    print_trainable_parameters(apply_lora(model, LoRAConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])))
    assert capsys.readouterr().out == (
        "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622\n"
    )


def test_shared_parameters_count_once(capsys):
    tied, untied = (count_parameters(make_model(tied))[1] for tied in (True, False))
    assert untied - tied == 32 * 16
    model = make_lora_model(target_modules=["q_proj"])
    trainable, total = count_parameters(model)
    assert trainable == 2 * 2 * (16 + 16) and total == untied + trainable
    print_trainable_parameters(model)
    assert re.fullmatch(
        r"trainable params: 128 \|\| all params: [\d,]+ \|\| trainable%: \d\.\d{4}\n", capsys.readouterr().out
    )


def test_train_adapter_only_sets_both_ways():
    model = make_lora_model()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    assert train_adapter_only(model) is model
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
