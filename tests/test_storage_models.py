"""Models on disk: what is written comes back, what does not fit is refused by name, and a kill leaves nothing half."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minilora.adapters.inject import apply_lora, lora_layers, merge_lora, unmerge_lora
from minilora.config import LoRAConfig
from minilora.model import GPT, GPTConfig
from minilora.storage.fingerprint import fingerprint
from minilora.storage.models import load_model, save_model

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
LINEAR = {"rope_type": "linear", "factor": 2.0}


def tiny(dtype=torch.float32, seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    shape = dict(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=64)
    model = GPT(GPTConfig(**{**shape, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.to(dtype)


def lora(model: GPT, **settings) -> GPT:
    """Wraps q, v and down with random A and B."""
    apply_lora(model, LoRAConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"], **settings))
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_A.normal_()
            layer.lora_B.normal_()
    return model


IDS = torch.arange(20).view(2, 10)


@pytest.fixture
def saved(tmp_path) -> Path:
    save_model(tiny(), tmp_path / "model")
    return tmp_path / "model"


def edit_config(directory: Path, **changes):
    """Sets fields of config.json; `...` removes one."""
    path = directory / "config.json"
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


def edit_tensors(directory: Path, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


# The round trip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(tie_word_embeddings=True),
        dict(attention_bias=True, mlp_bias=True, head_dim=6, rms_norm_eps=1e-3, rope_theta=5e5),
        dict(rope_scaling=LLAMA3),
        dict(rope_scaling=LINEAR),
        dict(dtype=torch.float64),
        dict(dtype=torch.bfloat16),
    ],
)
def test_what_is_saved_is_loaded(tmp_path, changes):
    model = tiny(**changes)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    expected, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with torch.no_grad():
        assert torch.equal(loaded(IDS), model(IDS)), (
            f"logits differ by up to {(loaded(IDS) - model(IDS)).abs().max():.3g}"
        )


@pytest.mark.parametrize("tied", [False, True])
def test_a_loaded_model_is_ready_to_train(tmp_path, tied):
    save_model(tiny(tie_word_embeddings=tied), tmp_path)
    loaded = load_model(tmp_path)
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    storages = {parameter.untyped_storage().data_ptr() for parameter in loaded.parameters()}
    assert len(storages) == len(list(loaded.parameters())), "each parameter owns its memory"
    loaded(IDS).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_loaded_model_and_its_file_go_separate_ways(saved):
    loaded, path = load_model(saved), saved / "model.safetensors"
    before = path.read_bytes()
    with path.open("r+b") as file:  # in place, so that a mapping of the file would see it
        file.write(bytes(len(before)))
    assert fingerprint(loaded) == fingerprint(tiny()), "the model must not change with the file"
    path.write_bytes(before)
    with torch.no_grad():
        loaded.lm_head.weight.zero_()
    assert path.read_bytes() == before, "the file must not change with the model"


def test_dtype_on_request(saved):
    loaded = load_model(saved, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, tiny().get_parameter(name).bfloat16()), name


def test_a_file_that_mixes_types_is_read_as_the_widest(saved):
    edit_tensors(saved, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items() if "norm" not in n}))
    assert {parameter.dtype for parameter in load_model(saved).parameters()} == {torch.float32}


def test_the_files_are_those_of_transformers(tmp_path):
    save_model(tiny(torch.bfloat16, tie_word_embeddings=True, rope_scaling=LLAMA3, rope_theta=5e5), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    settings = json.loads((tmp_path / "config.json").read_text())
    expected = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_act="silu",
        hidden_size=16,
        num_key_value_heads=2,
        head_dim=4,
        tie_word_embeddings=True,
        rope_theta=5e5,
        rope_scaling=LLAMA3,
        rope_parameters={"rope_theta": 5e5, **LLAMA3},
        torch_dtype="bfloat16",
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
    )
    assert {key: settings.get(key) for key in expected} == expected
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "model.layers.1.mlp.gate_proj.weight" in file.keys() and "lm_head.weight" not in file.keys()


def test_a_checkpoints_own_end_token_survives(saved, tmp_path):
    edit_config(saved, bos_token_id=7, eos_token_id=[8, 9])
    save_model(load_model(saved), tmp_path / "again")
    settings = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (7, [8, 9])


# Other people's files


OLD = dict(rope_parameters=..., dtype=...)
NEW = dict(rope_theta=..., rope_scaling=..., torch_dtype=...)


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ({**OLD, "rope_theta": 7.0, "rope_scaling": None}, dict(rope_theta=7.0)),
        ({**OLD, "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2}}, dict(rope_scaling=LINEAR)),
        ({**OLD, "rope_theta": 7.0, "rope_scaling": LLAMA3}, dict(rope_theta=7.0, rope_scaling=LLAMA3)),
        (
            {**NEW, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            dict(rope_theta=7.0, rope_scaling=None),
        ),
        ({**NEW, "rope_parameters": {"rope_theta": 7.0, **LLAMA3}}, dict(rope_theta=7.0, rope_scaling=LLAMA3)),
        ({**OLD, "rope_theta": ..., "rope_scaling": ...}, dict(rope_theta=10000.0, rope_scaling=None)),
        (dict(rms_norm_eps=..., max_position_embeddings=...), dict(rms_norm_eps=1e-6, max_position_embeddings=2048)),
        (dict(head_dim=..., attention_bias=..., tie_word_embeddings=...), dict(head_dim=4, tie_word_embeddings=False)),
        (dict(architectures=..., hidden_act=..., bos_token_id=...), {}),
    ],
)
def test_old_and_new_spellings_of_the_config(saved, spelling, expected):
    edit_config(saved, **spelling)
    config = load_model(saved).config
    assert {key: getattr(config, key) for key in expected} == expected


def test_absent_key_value_heads_mean_all_heads(tmp_path):
    save_model(tiny(num_key_value_heads=4), tmp_path)
    edit_config(tmp_path, num_key_value_heads=...)
    assert load_model(tmp_path).config.num_key_value_heads == 4


def test_old_rotary_buffers_are_ignored(saved):
    edit_tensors(saved, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert fingerprint(load_model(saved)) == fingerprint(tiny()), "what was saved is not what was loaded"


def into_shards(directory: Path) -> dict:
    """Splits the weights in two files with an index, as transformers does; returns the index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in ((1, names[:9]), (2, names[9:])):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_are_one_model(saved):
    into_shards(saved)
    with torch.no_grad():
        assert torch.equal(load_model(saved)(IDS), tiny()(IDS))


def test_a_tied_model_may_hold_its_matrix_twice_but_not_two(tmp_path):
    save_model(tiny(tie_word_embeddings=True), tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match="lm_head.weight of its own, but config.json ties it"):
        load_model(tmp_path)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="mistral"), "model_type 'mistral'; only 'llama'"),
        (dict(model_type=...), "model_type None; only 'llama'"),
        (dict(architectures=["LlamaForSequenceClassification"]), r"architectures \['LlamaForSequenceClassification'\]"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'; only 'silu'"),
        (dict(rope_parameters=..., rope_scaling={"type": "yarn"}), "rope_type 'yarn'; only default, linear, llama3"),
        (dict(rope_parameters={"rope_type": ["linear"]}), r"rope_type \['linear'\]"),
        (dict(rope_parameters={"rope_type": "linear"}), "config.json has no factor"),
        (dict(rope_parameters={**LLAMA3, "factor": "8"}), "factor '8', where a number above 0"),
        (dict(rope_parameters={**LLAMA3, "low_freq_factor": 4}), "high_freq_factor that is not above"),
        (dict(rope_parameters="llama3"), "rotary settings 'llama3'"),
        (dict(rope_parameters={"rope_theta": -1}), "rope_theta -1, where a number above 0"),
        (dict(hidden_size=...), "config.json has no hidden_size"),
        (dict(hidden_size="16"), "hidden_size '16', where a whole number above 0"),
        (dict(hidden_size=16.0), "hidden_size 16.0, where a whole number above 0"),
        (dict(num_hidden_layers=0), "num_hidden_layers 0, where a whole number above 0"),
        (dict(vocab_size=True), "vocab_size True, where a whole number above 0"),
        (dict(rms_norm_eps=float("nan")), "NaN is no number in JSON"),
        (dict(tie_word_embeddings="yes"), "tie_word_embeddings 'yes', where true or false"),
        (dict(num_key_value_heads=3), "config.json: num_attention_heads 4 is not divisible by num_key_value_heads 3"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused_by_field(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(saved)


def remove(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("model.norm.weight"), r"missing: model.norm.weight \(16,\)$"),
        (remove("lm_head.weight"), r"missing: lm_head.weight \(30, 16\)$"),
        (lambda t: t.update(bonus=torch.ones(2, 3)), r"not expected: bonus \(2, 3\)$"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(29, 16)}),
            r"of the wrong shape: lm_head.weight: expected \(30, 16\), found \(29, 16\)$",
        ),
        (
            lambda t: (t.pop("model.norm.weight"), t.pop("lm_head.weight"), t.update(a=torch.ones(1), b=torch.ones(1))),
            r"missing: model.norm.weight \(16,\), lm_head.weight \(30, 16\); not expected: a \(1,\), b \(1,\)$",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(30, 16, dtype=torch.int8)}),
            "lm_head.weight in .*model.safetensors has type I8; only F64, F32, F16, BF16",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, edit, message):
    edit_tensors(saved, edit)
    with pytest.raises(ValueError, match=message):
        load_model(saved)


def test_missing_files_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json is a file, not a folder"):
        load_model(saved / "config.json")
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor model.safetensors.index.json"):
        load_model(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="there is no file .*config.json"):
        load_model(saved)


def test_broken_files_are_named(saved):
    weights = (saved / "model.safetensors").read_bytes()
    for broken in (b"", weights[:4], weights[:100], weights[:-1], weights + b"x", b"\xff" * 8 + weights[8:]):
        (saved / "model.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
            load_model(saved)
    (saved / "config.json").write_text('{"hidden_size": 16,')
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load_model(saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda index: index.pop("weight_map"), "has no weight_map"),
        (
            lambda index: index["weight_map"].update(a="../other.safetensors"),
            "'../other.safetensors', which is not a plain",
        ),
        (lambda index: index["weight_map"].update(a=1), "maps a tensor to 1"),
        (lambda index: index["weight_map"].update(a="model-3.safetensors"), "there is no file .*model-3.safetensors"),
        (
            lambda index: index.update(weight_map={"a": "model-00001-of-00002.safetensors"}),
            "missing: model.layers.1.*lm_head.weight|missing: model.layers",
        ),
    ],
)
def test_an_index_that_lies_is_refused(saved, edit, message):
    index = into_shards(saved)
    edit(index)
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(saved)


def test_a_tensor_in_two_shards_is_refused(saved):
    index = into_shards(saved)
    name = next(iter(index["weight_map"]))
    shutil.copy(saved / index["weight_map"][name], saved / "model-3.safetensors")
    index["weight_map"]["again"] = "model-3.safetensors"
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"tensor .* is in .*{index['weight_map'][name]} and again in model-3"):
        load_model(saved)


# Saving


def test_a_merged_model_is_saved_as_the_plain_model_it_is(tmp_path):
    model = lora(tiny(torch.float64))
    with torch.no_grad():
        apart = model(IDS)
        merge_lora(model)
        save_model(model, tmp_path)
        loaded = load_model(tmp_path)
        assert list(loaded.state_dict()) == list(tiny().state_dict())
        assert torch.equal(loaded(IDS), model(IDS)), (
            f"logits differ by up to {(loaded(IDS) - model(IDS)).abs().max():.3g}"
        )
        difference = (loaded(IDS) - apart).abs().max().item()
    assert difference < 1e-10, f"merged and saved, the model differs from base and adapter apart by {difference:.3g}"
    assert all(layer.merged for _, layer in lora_layers(model)), "saving leaves the model as it is"


def test_lora_that_is_not_merged_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"6 LoRA layers are not merged \(model.layers.0.self_attn.q_proj .*merge_lora"
    ):
        save_model(lora(tiny()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_no_llama_is_refused(tmp_path):
    model = tiny()
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="this model.*not expected: extra.weight"):
        save_model(model, tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="file is a file; saving needs a folder"):
        save_model(tiny(), tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write .* in the folder .*file/deeper"):
        save_model(tiny(), tmp_path / "file" / "deeper")
    assert (tmp_path / "file").read_text() == "precious"


# The fingerprint


@pytest.mark.parametrize("tied", [False, True])
def test_the_fingerprint_is_of_the_base_with_and_without_lora(tied):
    model = tiny(tie_word_embeddings=tied)
    plain = fingerprint(model)
    assert len(plain) == 64, f"64 characters of SHA-256, not {len(plain)}: {plain}"
    lora(model)
    assert fingerprint(model) == plain, "applied"
    merge_lora(model)
    assert fingerprint(model) == plain, "merged"
    unmerge_lora(model)
    assert fingerprint(model) == plain, "unmerged"


def test_the_fingerprint_does_not_depend_on_the_type_a_base_is_loaded_in(saved):
    expected = fingerprint(tiny())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert fingerprint(load_model(saved, dtype=dtype)) == expected, dtype


def test_the_fingerprint_does_not_depend_on_the_number_of_threads():
    model, threads = tiny(hidden_size=256, intermediate_size=512), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fingerprint(model)
        torch.set_num_threads(2)
        assert fingerprint(model) == one, "the same weights should have the same mark"
    finally:
        torch.set_num_threads(threads)


def test_every_weight_counts_and_so_does_its_place():
    # Tensors larger than the sample, and of sizes that are not a multiple of four.
    shape = dict(hidden_size=126, head_dim=32, intermediate_size=301, num_hidden_layers=1)
    base = fingerprint(tiny(**shape))
    for name, _ in tiny(**shape).named_parameters():
        for place in (0, 1, -1):
            changed = tiny(**shape)
            with torch.no_grad():
                changed.get_parameter(name).view(-1)[place] += 0.1
            assert fingerprint(changed) != base, f"{name}[{place}] was changed"
    swapped = tiny(**shape)
    with torch.no_grad():
        weight = swapped.model.layers[0].mlp.up_proj.weight
        weight.copy_(weight.flip(0))
    assert fingerprint(swapped) != base, "rows in another order"
