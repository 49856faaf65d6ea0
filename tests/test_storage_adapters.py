"""Adapters on disk: PEFT's layout to the letter, and a model that is left as it was when a file does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minilora.adapters.inject import apply_lora, disable_lora, lora_layers, merge_lora
from minilora.config import LoRAConfig
from minilora.model import GPT, GPTConfig
from minilora.storage.adapters import load_adapter, save_adapter
from minilora.storage.fingerprint import fingerprint

IDS = torch.arange(20).view(2, 10)
SETTINGS = dict(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"])


def base(dtype=torch.float64, seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    shape = dict(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=64)
    model = GPT(GPTConfig(**{**shape, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.to(dtype)


def adapted(model: GPT | None = None, **changes) -> GPT:
    """A model with random A and B, as if trained; their values are float32's, so the file loses nothing."""
    model = apply_lora(model or base(), LoRAConfig(**{**SETTINGS, **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=generator))
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    return model


def logits(model: GPT) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


@pytest.fixture
def saved(tmp_path) -> Path:
    save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(directory: Path, **changes):
    """Sets fields of adapter_config.json; `...` removes one."""
    path = directory / "adapter_config.json"
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


def edit_tensors(directory: Path, edit):
    path = directory / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata)


# The layout


def test_the_files_are_those_of_peft(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    settings = json.loads((saved / "adapter_config.json").read_text())
    assert settings == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    expected = {}
    for layer in range(2):
        for module, size_in, size_out in (
            ("self_attn.q_proj", 16, 16),
            ("self_attn.v_proj", 16, 8),
            ("mlp.down_proj", 24, 16),
        ):
            name = f"base_model.model.model.layers.{layer}.{module}"
            expected |= {f"{name}.lora_A.weight": (3, size_in), f"{name}.lora_B.weight": (size_out, 3)}
    tensors = load_file(saved / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    with safe_open(saved / "adapter_model.safetensors", "pt") as file:
        metadata, base_s = file.metadata(), fingerprint(base())
    assert metadata.keys() == {"format", "base_fingerprint"} and metadata["format"] == "pt", metadata
    noted = metadata["base_fingerprint"]
    assert noted == base_s, f"the file notes another base than the one it was saved from: {noted}, not {base_s}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_adapters_are_float32_on_any_base(tmp_path, dtype):
    save_adapter(adapted(base(dtype)), tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}


# The round trip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(target_modules="all-linear"),
        dict(target_modules=r".*layers\.1\..*(up|gate)_proj"),
        dict(use_rslora=True, r=4),
        dict(rank_pattern={"layers.0.self_attn.q_proj": 2, "down_proj": 5}, alpha_pattern={"v_proj": 9}),
    ],
)
def test_a_saved_adapter_gives_the_same_model_again(tmp_path, changes):
    model = adapted(**changes)
    save_adapter(model, tmp_path)
    loaded = load_adapter(base(), tmp_path)
    assert replace(loaded.lora_config, target_modules=model.lora_config.target_modules) == model.lora_config
    assert torch.equal(logits(loaded), logits(model))
    assert (logits(loaded) - logits(base())).abs().max() > 1e-2, "the adapter must change something"
    with disable_lora(loaded):
        assert torch.equal(logits(loaded), logits(base()))


def test_loading_trains_the_adapter_and_nothing_else(saved):
    model = base()
    assert load_adapter(model, saved) is model
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if n.endswith(("lora_A", "lora_B"))} != set()


def test_a_wrapped_model_with_the_same_config_is_filled(saved):
    model = apply_lora(base(), LoRAConfig(**{**SETTINGS, "lora_dropout": 0.1}))
    model.eval()
    edit_config(saved, target_modules=["down_proj", "v_proj", "q_proj"])  # a set in PEFT: the order means nothing
    load_adapter(model, saved)
    assert torch.equal(logits(model), logits(adapted()))


def test_merged_layers_save_the_same_adapter(saved, tmp_path):
    model = adapted()
    merge_lora(model)
    save_adapter(model, tmp_path / "merged")
    apart, merged = (
        (folder, load_file(folder / "adapter_model.safetensors")) for folder in (saved, tmp_path / "merged")
    )
    assert (merged[0] / "adapter_config.json").read_text() == (apart[0] / "adapter_config.json").read_text()
    assert merged[1].keys() == apart[1].keys() and all(
        torch.equal(merged[1][name], apart[1][name]) for name in apart[1]
    )
    load_adapter(base(), tmp_path / "merged")  # the fingerprint is that of the base before the merge


def test_a_half_precision_adapter_loads_into_float32(saved):
    edit_tensors(saved, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    model = load_adapter(base(torch.float32), saved)
    for (name, layer), (_, original) in zip(lora_layers(model), lora_layers(adapted()), strict=True):
        assert layer.lora_A.dtype == torch.float32
        assert torch.equal(layer.lora_A, original.lora_A.bfloat16().float()), name


def test_a_config_written_by_peft_is_read(saved):
    """What PEFT 0.21 writes beyond our fields: all of it switched off, or about where the adapter comes from."""
    edit_config(
        saved,
        alora_invocation_tokens=None,
        arrow_config=None,
        auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
        base_model_name_or_path="meta-llama/Llama-2-7b-hf",
        corda_config=None,
        ensure_weight_tying=False,
        eva_config=None,
        exclude_modules=None,
        init_lora_weights="gaussian",
        layer_replication=None,
        layers_pattern=None,
        layers_to_transform=None,
        loftq_config={},
        lora_bias=False,
        megatron_config=None,
        megatron_core="megatron.core",
        peft_version="0.21.0",
        qalora_group_size=16,
        revision=None,
        target_parameters=None,
        trainable_token_indices=None,
        use_qalora=False,
    )
    assert torch.equal(logits(load_adapter(base(), saved)), logits(adapted()))


# Refusals


def state(model: GPT) -> dict:
    """Everything that loading could change: modules, values, what is trained, modes, and the config."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "parameters": {n: (id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()},
        "config": getattr(model, "lora_config", None),
    }


def assert_refused(model: GPT, directory: Path, error: type[Exception], message: str, **settings):
    before = state(model)
    with pytest.raises(error, match=message):
        load_adapter(model, directory, **settings)
    after = state(model)
    changed = [old[0] for old, new in zip(before["modules"], after["modules"], strict=True) if old != new]
    assert not changed, f"refused, and yet {changed} were replaced by other modules or are in another mode"
    assert after["config"] == before["config"], f"refused, and yet the config is {after['config']}"
    assert after["parameters"].keys() == before["parameters"].keys()
    for name, (identity, trained, values) in before["parameters"].items():
        now = after["parameters"][name]
        assert now[0] == identity, f"refused, and yet {name} is another tensor"
        assert now[1] == trained, f"refused, and yet requires_grad of {name} went from {trained} to {now[1]}"
        assert torch.equal(now[2], values), f"refused, and yet {name} changed by {(now[2] - values).abs().max():.1e}"


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B1 = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: (t.pop(A0), t.pop(B1)), rf"missing: {A0} \(3, 16\), {B1} \(16, 3\)$"),
        (lambda t: t.update(odd=torch.ones(2), even=torch.ones(1)), r"not expected: .*(odd|even).*(odd|even)"),
        (lambda t: t.update({A0: torch.ones(16, 3)}), rf"wrong shape: {A0}: expected \(3, 16\), found \(16, 3\)$"),
        (lambda t: t.update({A0: torch.ones(3, 16).int()}), f"{A0} in .* has type I32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, edit, message, wrapped):
    edit_tensors(saved, edit)
    model = apply_lora(base(), LoRAConfig(**SETTINGS)) if wrapped else base()
    assert_refused(model, saved, ValueError, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(peft_type="PREFIX_TUNING"), "peft_type 'PREFIX_TUNING'; only 'LORA'"),
        (dict(peft_type=...), "peft_type None"),
        (dict(bias="all"), "not supported: bias 'all'"),
        (dict(modules_to_save=["lm_head"], lora_bias=True), r"modules_to_save \['lm_head'\].*lora_bias True"),
        (dict(use_dora=True), "missing: .*lora_magnitude_vector"),
        (dict(use_dora="yes"), "use_dora 'yes'.*wrong type"),
        (dict(lora_alfa=16), "not supported: lora_alfa 16"),
        (dict(layers_to_transform=[0]), "not expected: .*layers.1"),  # the file holds both layers
        (dict(layers_to_transform="0"), r"layers_to_transform \['0'\], where numbers of layers are expected"),
        (dict(layers_to_transform=[True]), r"layers_to_transform \[True\], where numbers of layers are expected"),
        (dict(layers_to_transform=0, layers_pattern="h"), "layers_pattern 'h'; a Llama model's are called 'layers'"),
        (dict(layers_to_transform=0, target_modules="all-linear"), "needs target_modules as a list of names"),
        (dict(trainable_token_indices=0), "not supported: trainable_token_indices 0"),  # token 0, and not "off"
        (dict(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
        (dict(r=...), "has no r"),
        (dict(lora_alpha=None), "has no lora_alpha"),
        (dict(r="8"), "has r '8', which is of the wrong type"),
        (dict(r=True), "has r True, which is of the wrong type"),
        (dict(lora_alpha="16"), "has lora_alpha '16', which is of the wrong type"),
        (dict(target_modules={"q_proj": 1}), "has target_modules .* wrong type"),
        (dict(use_rslora=1), "has use_rslora 1, which is of the wrong type"),
        (dict(alpha_pattern={"q_proj": "9"}), "adapter_config.json: "),
        (dict(r=0), "adapter_config.json: r is 0"),
        (dict(lora_dropout=1.5), "adapter_config.json: lora_dropout is 1.5"),
        (dict(target_modules=["q_proj", "c_attn"]), "'c_attn' matches no layer"),
        (dict(rank_pattern={"k_proj": 2}), "rank_pattern key 'k_proj' matches none"),
        (dict(r=4), rf"wrong shape: .*{A0}: expected \(4, 16\), found \(3, 16\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved, changes, message):
    edit_config(saved, **changes)
    assert_refused(base(), saved, ValueError, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(r=4), r"r \(3 in the model, 4 in the file\)"),
        (dict(lora_alpha=6, use_rslora=True), r"lora_alpha \(5 in the model, 6 in the file\), use_rslora \(False"),
        (dict(target_modules=["q_proj"]), "target_modules "),
    ],
)
def test_a_wrapped_model_with_another_config_is_refused_by_field(saved, changes, message):
    edit_config(saved, **changes)
    assert_refused(apply_lora(base(), LoRAConfig(**SETTINGS)), saved, ValueError, message)


def test_a_merged_model_is_refused(saved):
    model = adapted()
    merge_lora(model)
    assert_refused(model, saved, ValueError, "merged; unmerge_lora")


@pytest.mark.parametrize("wrapped", [False, True])
def test_another_base_is_refused_unless_forced(saved, wrapped):
    other = base(seed=9)
    if wrapped:
        apply_lora(other, LoRAConfig(**SETTINGS))
    assert_refused(other, saved, ValueError, "trained on another base.*force=True")
    expected = logits(adapted(base(seed=9)))
    assert torch.equal(logits(load_adapter(other, saved, force=True)), expected)


def test_force_forgives_the_base_only(saved):
    edit_tensors(saved, lambda tensors: tensors.pop(A0))
    assert_refused(base(seed=9), saved, ValueError, f"missing: {A0}", force=True)


def test_a_file_without_a_fingerprint_is_taken_at_its_word(saved):
    path = saved / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})
    load_adapter(base(seed=9), saved)


def test_missing_and_broken_files_are_named(saved, tmp_path):
    config, weights = saved / "adapter_config.json", saved / "adapter_model.safetensors"
    assert_refused(base(), tmp_path / "nowhere", FileNotFoundError, "nowhere is not a folder")
    assert_refused(base(), config, FileNotFoundError, "adapter_config.json is a file, not a folder")
    whole = weights.read_bytes()
    for broken in (b"", whole[:50], whole[:-1]):
        weights.write_bytes(broken)
        assert_refused(base(), saved, ValueError, "adapter_model.safetensors is not a whole safetensors file")
    weights.unlink()
    assert_refused(base(), saved, FileNotFoundError, "there is no file .*adapter_model.safetensors")
    config.write_text("{")
    assert_refused(base(), saved, ValueError, "adapter_config.json is not valid JSON")
    config.unlink()
    assert_refused(base(), saved, FileNotFoundError, "there is no file .*adapter_config.json")


def test_a_plain_model_has_no_adapter_to_save(tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers"):
        save_adapter(base(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
