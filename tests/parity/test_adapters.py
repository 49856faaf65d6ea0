"""Adapters held against PEFT: the same files, the same logits, the same gradients, and what only PEFT has refused."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from minilora import (
    LoRAConfig,
    apply_lora,
    load_adapter,
    load_model,
    lora_layers,
    merge_lora,
    print_trainable_parameters,
    save_adapter,
    save_model,
)

REASON = "held against transformers, peft and bitsandbytes, which `pip install -e '.[parity]'` installs"
peft = pytest.importorskip("peft", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

BAR = 1e-6  # of logits and of gradients over their norm, in float64
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "two layers": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "all by name": dict(r=8, lora_alpha=4, target_modules=LINEARS),
    "all-linear": dict(r=3, lora_alpha=5, target_modules="all-linear"),
    "full names": dict(r=4, lora_alpha=8, target_modules=["layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj"]),
    # The second half matches a part of names only, so nothing.
    "expression": dict(r=4, lora_alpha=8, target_modules=r".*\.1\.(self_attn\.[qo]|mlp\.down)_proj|.*\.up"),
    "rsLoRA": dict(r=16, lora_alpha=4, target_modules=LINEARS, use_rslora=True),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=LINEARS,
        # Of keys that overlap the first counts, and PEFT sorts them when it saves: these are in that order.
        rank_pattern={"down_proj": 2, r"layers\.0\.self_attn\..*": 6, "q_proj": 9},
        alpha_pattern={"1.self_attn.v_proj": 90, "model.layers.1.mlp.gate_proj": 20, "v_proj": 3.5},
    ),
    "patterns under rsLoRA": dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], use_rslora=True, rank_pattern={"up_proj": 9}
    ),
    "DoRA": dict(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True),
    "DoRA with rsLoRA": dict(r=4, lora_alpha=2, target_modules=LINEARS[2:5], use_dora=True, use_rslora=True),
}


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch):
    """transformers computes norms in float32 in any model; in float64 that alone would move logits by the bar."""
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm
    monkeypatch.setattr(
        norm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
    )


def randomize(model, seed=1):
    """Random A and B and magnitudes, ours and PEFT's; float32's values, so that no file loses anything."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_magnitude" in name:
            weight.data.mul_(1 + 0.2 * torch.randn(weight.shape, generator=generator)).copy_(weight.data.float())
        elif "lora_" in name:
            scale = weight.shape[1] ** -0.5 if "lora_A" in name else 0.1
            weight.data.copy_(scale * torch.randn(weight.shape, generator=generator))
    return model


def ours_with(model, case):
    return randomize(apply_lora(model, LoRAConfig(**CASES[case])))


def theirs_with(model, case):
    config = peft.LoraConfig(**CASES[case], task_type="CAUSAL_LM")
    return randomize(peft.get_peft_model(model, config)).eval()


def assert_adapter_counts(ids, model, with_adapter):
    with torch.no_grad():
        difference = (model(ids(2, 24)) - with_adapter).abs().max()
    assert difference > 0.05, f"the adapter changes the logits by {difference} only"


@pytest.mark.parametrize("case", CASES)
def test_our_adapters_load_in_peft(both, assert_same_logits, ids, tmp_path, case):
    base, ours = both(torch.float64, attention_bias=True)
    save_adapter(ours_with(ours, case), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    names = {name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert names == {name for name, _ in lora_layers(ours)}
    logits = assert_same_logits("float64 logits", ours, theirs, BAR)
    assert_adapter_counts(ids, load_model(tmp_path / "base", dtype=torch.float64), logits)


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_peft_load_here(both, assert_same_logits, ids, tmp_path, case):
    base, ours = both(torch.float64, attention_bias=True)
    theirs = theirs_with(base, case)
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    logits = assert_same_logits("float64 logits", ours, theirs, BAR)
    assert_adapter_counts(ids, load_model(tmp_path / "base", dtype=torch.float64), logits)


ONLY_PEFTS = {  # settings that we read, and never write
    "some layers": dict(target_modules=["q_proj", "mlp.up_proj"], layers_to_transform=[1]),
    "layer 0": dict(target_modules=["q_proj", "mlp.up_proj"], layers_to_transform=0, layers_pattern="layers"),
    "the head, with a copy of its weight": dict(target_modules=["v_proj", "lm_head"]),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", ONLY_PEFTS)
def test_what_only_peft_writes_loads_here(both, assert_same_logits, ids, tmp_path, case, tied):
    base, ours = both(torch.float64, tie_word_embeddings=tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of the embedding that it saves and of weights that are tied
        theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, **ONLY_PEFTS[case], task_type="CAUSAL_LM"))
        randomize(theirs).eval().save_pretrained(tmp_path / "adapter")
    copies = [name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "base_layer" in name]
    assert bool(copies) == ("head" in case), f"PEFT has copied {copies}"
    load_adapter(ours, tmp_path / "adapter")
    logits = assert_same_logits("float64 logits", ours, theirs, BAR)
    assert_adapter_counts(ids, load_model(tmp_path / "base", dtype=torch.float64), logits)


def test_bfloat16_adapter_files(both, assert_same_logits, tmp_path):
    base, ours = both(torch.float64, attention_bias=True)
    theirs_with(base, "patterns").bfloat16().save_pretrained(tmp_path / "adapter")
    assert {t.dtype for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert_same_logits("float64 logits", load_adapter(ours, tmp_path / "adapter"), theirs, BAR)


@pytest.mark.parametrize("case", ["all-linear", "patterns", "DoRA"])
def test_merged_models_equal(both, assert_same_logits, assert_close, tmp_path, case):
    """In memory, and each library's merged model from disk in the other."""
    base, ours = both(torch.float64, attention_bias=True)
    theirs = theirs_with(base, case)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_lora(load_adapter(ours, tmp_path / "adapter"))
    theirs = theirs.merge_and_unload()
    for name, layer in lora_layers(ours):
        weight = theirs.get_submodule(name).weight
        assert_close(f"{name}: merged float64 weights", layer.base_layer.weight, weight, 1e-12)
    assert_same_logits("merged float64 logits", ours, theirs, BAR)
    theirs.save_pretrained(tmp_path / "theirs")
    save_model(ours, tmp_path / "ours")
    assert_same_logits("float64 logits of their merged file", load_model(tmp_path / "theirs"), theirs, BAR)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64).eval()
    assert_same_logits("float64 logits of our merged file", ours, again, BAR)


# Below a layer's width in tokens we compute the update as two products, above it in one with the base.
@pytest.mark.parametrize("shape", [(2, 16), (4, 64)], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("case", ["all-linear", "patterns", "DoRA"])
def test_gradients_equal(both, ids, assert_close, tmp_path, case, shape):
    base, ours = both(torch.float64, attention_bias=True)
    theirs = theirs_with(base, case)
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    tokens = ids(*shape)
    for logits in (ours(tokens), theirs(tokens).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert all((parameter.grad is None) == ("lora_" not in name) for name, parameter in ours.named_parameters())
    for name, layer in lora_layers(ours):
        peer = theirs.base_model.model.get_submodule(name)
        for part, parameter in layer.named_parameters(recurse=False):
            found, expected = parameter.grad, getattr(peer, part).default.weight.grad
            size = expected.norm()
            assert size > 1e-3, f"the gradient of {name}.{part} is next to nothing"
            assert_close(f"{name}.{part}: float64 gradients over their norm", found / size, expected / size, BAR)


def test_trainable_parameters_are_counted_alike(both, capsys):
    base, ours = both(torch.float64, attention_bias=True)
    print_trainable_parameters(ours_with(ours, "patterns"))
    theirs_with(base, "patterns").print_trainable_parameters()
    found, expected = capsys.readouterr().out.splitlines()
    assert found == expected


LORA = dict(r=2, lora_alpha=4, target_modules=["q_proj"])
REFUSED = {
    "PiSSA": (lambda: peft.LoraConfig(**LORA, init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
    "biases": (lambda: peft.LoraConfig(**LORA, bias="lora_only"), "not supported: .*bias 'lora_only'"),
    "whole modules": (lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head"]), r"modules_to_save \['lm_head'\]"),
    "parameters": (lambda: peft.LoraConfig(**LORA, target_parameters=["mlp.up_proj.weight"]), "target_parameters"),
    "IA3": (lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "with peft_type 'IA3'"),
    "LoHa": (lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]), "with peft_type 'LOHA'"),
    "VeRA": (lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]), "with peft_type 'VERA'"),
    "prompt tuning": (
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "with peft_type 'PROMPT_TUNING'",
    ),
    "prefix tuning": (
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "with peft_type 'PREFIX_TUNING'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_only_peft_has_is_refused_by_name(both, tmp_path, case):
    base, ours = both()
    config, message = REFUSED[case]
    peft.get_peft_model(base, config()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"adapter_config.json .*{message}"):
        load_adapter(ours, tmp_path / "adapter")
    assert not list(lora_layers(ours))
