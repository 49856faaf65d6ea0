"""Exercise 06: an adapter on disk."""

import copy
import json
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minilora.adapters.adapter import Adapter
from minilora.adapters.dora import DoRALinear
from minilora.adapters.inject import lora_layers
from minilora.config import LoRAConfig
from minilora.exercises.checking import Draw, Exercise, expect, expect_error, require
from minilora.exercises.layers import assemble
from minilora.linear4bit import replace_module
from minilora.lora import LoRALinear
from minilora.model import GPT, GPTConfig
from minilora.storage.adapters import read_adapter, save_adapter
from minilora.storage.fingerprint import fingerprint

EXERCISE = Exercise(
    number=6,
    slug="save_and_load",
    title="An adapter on disk",
    targets=("storage.adapters:save_adapter", "storage.adapters:read_adapter"),
    difficulty=2,
    minutes=45,
    notebook="05_merge_swap_serve",
    section="2. What is in the file",
    explanation="""\
An adapter is a folder of two files. `adapter_model.safetensors` (ADAPTER_WEIGHTS) has two float32 tensors a layer,
under PEFT's names: `base_model.model.<layer>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r), for DoRA also
`.lora_magnitude_vector` (out,). `adapter_config.json` (ADAPTER_CONFIG) has the fields of `LoRAConfig` and those in
LORA_FIELDS. Without its base an adapter means nothing, so the metadata of the first file holds the base's fingerprint
under `base_fingerprint`.

`save_adapter`: `extract_adapter(model)` gives config, A, B and magnitude by layer, merged or not, also after a start
from PiSSA, and refuses a plain model. `write_adapter(model, directory, tensors, settings)` writes both files, with the
fingerprint of the model's base from before LoRA, and raises a ValueError where it cannot.

`read_adapter` only reads: the model is as before. It returns an `Adapter` by plain layer name. FileNotFoundError for a
missing folder or file; ValueError for damaged files, a config we cannot follow (`_read_config`) and a target that names
no layer; ValueError naming every tensor that is missing, not expected or of the wrong shape, not the first alone;
ValueError for another base, which `check_base(model, directory)` raises. `force` forgives the base only. A file without
a fingerprint is another library's and passes. Which layers a config means is `find_targets`, exercise 04.""",
    hints=(
        "The helpers are in this module and imported at its top: _tensor_name(layer, 'lora_A'), _read_config(path), "
        "check_directory, read_header (name -> type and shape), check_tensors(where, expected, found).",
        "What to expect in a file follows from its config and the model's shapes. A second model without data shows "
        "them: `with torch.device('meta'): other = GPT(model.config)`, and check_targets(other, config) of "
        "adapters.inject names the layers, each with r = layer_rank(config, name).",
        "save: write_adapter(model, directory, tensors, {**LORA_FIELDS, **asdict(adapter.config)}), the tensors under "
        "_tensor_name. read: directory, config, header, check_tensors on a dictionary of all expected shapes; then "
        "open_safetensors and file.get_tensor; check_base unless force; last Adapter(config, A, B, magnitude).",
    ),
    question="An adapter of one base has just the right shapes for another base of the same size. What happens if it "
    "is loaded, and why would no check of names and shapes ever notice?",
    answer="It loads and runs, and what it adds to the weights is the change that another base needed: the outputs "
    "get worse or become nonsense, without an error. Names and shapes follow from the architecture, which both bases "
    "share; only the numbers in W tell them apart. So the file keeps a fingerprint of the base's weights, and "
    "reading compares it.",
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names, which are the exercise
PREFIX = "base_model.model."


def base(draw: Draw, layers: int = 1, dtype=torch.float32) -> GPT:
    """A tiny GPT with random weights."""
    model = GPT(GPTConfig(7, 8, 6, layers, 2, 1, max_position_embeddings=4))
    for parameter in model.parameters():
        parameter.data = draw.normal(*parameter.shape, dtype=dtype)
    return model.requires_grad_(False)


def adapted(draw: Draw, plain: GPT, kind: type = LoRALinear, **settings) -> GPT:
    """A copy of a plain model with LoRA layers around q_proj, or target_modules; A and B are random float32 numbers."""
    model, config = copy.deepcopy(plain), LoRAConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    for name, linear in list(model.named_modules()):
        if (last := name.rpartition(".")[2]) in config.target_modules:
            layer = assemble(draw, linear, config.rank_pattern.get(last, config.r), config.lora_alpha, kind=kind)
            for parameter in (layer.lora_A, layer.lora_B):
                parameter.data = parameter.data.float().to(torch.promote_types(linear.weight.dtype, torch.float32))
            replace_module(model, name, layer)
    model.lora_config = config
    return model


def tensors_of(model: GPT, prefix: str = PREFIX, suffix: str = ".weight") -> dict[str, Tensor]:
    """What the file holds of plain LoRA."""
    parts = {(name, part): getattr(layer, part) for name, layer in lora_layers(model) for part in ("lora_A", "lora_B")}
    return {f"{prefix}{name}.{part}{suffix}": tensor.detach().float() for (name, part), tensor in parts.items()}


@contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path) / "adapter"


def write(path: Path, model: GPT, tensors: dict | None = None, note: bool = True, **settings):
    """The two files by hand, with other tensors or settings at will, and without the fingerprint if not `note`."""
    path.mkdir(exist_ok=True)
    metadata = {"format": "pt", **({"base_fingerprint": fingerprint(model)} if note else {})}
    save_file(tensors_of(model) if tensors is None else tensors, path / WEIGHTS, metadata)
    (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", **asdict(model.lora_config), **settings}))


def saved(model: GPT, case: dict) -> tuple[dict[str, Tensor], dict, dict]:
    """What save_adapter wrote: tensors, metadata, config."""
    with folder() as path:
        save_adapter(model, str(path))
        found = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
        slip = "ADAPTER_WEIGHTS and ADAPTER_CONFIG are their names; write_adapter writes both"
        expected = sorted((WEIGHTS, CONFIG))
        require(found == expected, f"expected the files {', '.join(expected)}, got {', '.join(found)}", case, slip)
        with safe_open(path / WEIGHTS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}, json.loads((path / CONFIG).read_text())


def picture(model: GPT) -> tuple:
    """All that reading must leave alone: modules, parameters, their numbers, what is trained, the config."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.tolist()) for name, p in model.named_parameters()]
    return modules, parameters, getattr(model, "lora_config", None)


def accepted(model: GPT, path: Path, case: dict, why: str, force: bool = False) -> Adapter:
    """What read_adapter returns for files that fit. Wrong if it refuses them, for `why`, or changes the model."""
    before, fault = picture(model), ""
    try:
        adapter = read_adapter(model, str(path), force=force)
    except ValueError as error:
        fault = str(error).replace(str(path), "the folder")
    slip = "read_adapter must not touch the model; ask a second one, on the meta device, for the shapes"
    require(before == picture(model), "read_adapter changed the model", case, slip)
    require(not fault, f"expected an Adapter, got the ValueError {fault[:150]!r}", case, why)
    require(isinstance(adapter, Adapter), f"expected an Adapter, got {type(adapter).__name__}", case)
    return adapter


def not_found(action: Callable, case: dict):
    """Raises Wrong unless the action raises FileNotFoundError."""
    try:
        action()
    except FileNotFoundError:
        return
    require(False, "expected a FileNotFoundError, got no error", case)


@EXERCISE.property("save: A and B of every layer in float32, under PEFT's names")
def tensors_saved(draw: Draw):
    for targets, dtype in ((["q_proj"], torch.float32), (["o_proj", "up_proj"], torch.float64)):
        model = adapted(draw, base(draw, dtype=dtype), target_modules=targets, r=draw.integer(2, 3))
        case = {"target_modules": targets, "dtype of the base": dtype}
        found, wanted = saved(model, case)[0], tensors_of(model)
        slips = {
            f"the names begin with {PREFIX}": tensors_of(model, ""),
            f"the names begin with {PREFIX}, twice 'model.' for a GPT": tensors_of(model, "base_model."),
            "the names of A and B end in .weight": tensors_of(model, suffix=""),
            "'default' is part of the name in PEFT's memory, not in its files": tensors_of(
                model, suffix=".default.weight"
            ),
        }
        slips = {sentence: sorted(names) for sentence, names in slips.items()}
        expect(sorted(found), sorted(wanted), case, slips, "the names of the tensors")
        for name, tensor in wanted.items():
            other = wanted[name.replace("lora_A", "lora_?").replace("lora_B", "lora_A").replace("lora_?", "lora_B")]
            slips = {
                "A and B are exchanged": other,
                "stored transposed: A is (r, in), B is (out, r)": tensor.T,
                "rounded to float16 on the way; an adapter is stored in float32": tensor.half().float(),
                "rounded to bfloat16 on the way; an adapter is stored in float32": tensor.bfloat16().float(),
            }
            expect(found[name], tensor, case, slips, name, tolerance=1e-7)
            slip = "store A and B in float32, whatever the model is in: tensor.float()"
            kind = found[name].dtype
            require(kind == torch.float32, f"{name}: expected torch.float32, got {kind}", case, slip)


@EXERCISE.property("save: the config, with every setting of the model's LoRAConfig")
def config_saved(draw: Draw):
    settings = dict(target_modules=["q_proj", "v_proj"], r=3, lora_alpha=draw.integer(5, 30), lora_dropout=0.25)
    settings |= dict(rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 7}, use_rslora=True)
    model = adapted(draw, base(draw), **settings)
    found = saved(model, settings)[2]
    slip = "PEFT asks which method it is: peft_type, LORA, is among LORA_FIELDS"
    expect(found.get("peft_type"), "LORA", settings, {slip: None}, "peft_type")
    for field, value in asdict(model.lora_config).items():
        slips = {"the setting is not in the file: asdict(config) has them all": None}
        slips["that is the default, not what this model has"] = asdict(LoRAConfig())[field]
        expect(found.get(field), value, settings, slips, field)


@EXERCISE.property("save: the fingerprint of the base; a merged model saves the same files, and stays merged")
def fingerprint_saved(draw: Draw):
    plain = base(draw)
    model = adapted(draw, plain)
    wanted, tensors = fingerprint(plain), tensors_of(model)
    for merged in (False, True):
        case = {"merged": merged}
        if merged:
            for _, layer in lora_layers(model):
                layer.original_weight = layer.base_layer.weight.detach().clone()
                layer.base_layer.weight.data += (layer.scaling * layer.lora_B @ layer.lora_A).detach()
        before = picture(model)
        found, notes, _ = saved(model, case)
        slip = "it belongs into the metadata of the safetensors file; write_adapter puts it there"
        require("base_fingerprint" in notes, "expected a base_fingerprint in the metadata, got none", case, slip)
        slip = "fingerprint(model) knows the base's weights from before; a merged weight is not among them"
        same = notes["base_fingerprint"] == wanted
        require(same, "the base_fingerprint is not that of the base from before", case, slip)
        for name, tensor in tensors.items():
            expect(found.get(name), tensor, case, what=name, tolerance=1e-7)
        require(before == picture(model), "save_adapter changed the model", case, "saving only looks at the model")


@EXERCISE.property("save: DoRA's magnitude as well; after a start from PiSSA, plain LoRA of twice the rank")
def variants_saved(draw: Draw):
    model = adapted(draw, base(draw), DoRALinear, use_dora=True)
    ((name, layer),) = lora_layers(model)
    layer.lora_magnitude_vector = nn.Parameter(draw.normal(layer.out_features, dtype=torch.float32))
    case, key = {"use_dora": True}, f"{PREFIX}{name}.lora_magnitude_vector"
    slips = {"DoRA's magnitude is not saved": sorted(tensors_of(model))}
    slips["the magnitude's name has no .weight behind it"] = sorted({*tensors_of(model), f"{key}.weight"})
    found = saved(model, case)[0]
    expect(sorted(found), sorted({*tensors_of(model), key}), case, slips, "the names of the tensors")
    expect(found[key], layer.lora_magnitude_vector, case, what=key, tolerance=1e-7)

    model = adapted(draw, base(draw), init_lora_weights="pissa", lora_alpha=6)
    ((name, layer),) = lora_layers(model)
    A, B = (draw.normal(*matrix.shape, dtype=torch.float32) for matrix in (layer.lora_A, layer.lora_B))
    layer.start_A, layer.start_B = A, B
    case = {"init_lora_weights": "pissa", "r": 2, "lora_alpha": 6}
    found, _, settings = saved(model, case)
    slip = (
        "A and B began as a part of W, so BA is not the change: extract_adapter has made plain LoRA of it, of rank 2r"
    )
    slips = {slip: layer.scaling * layer.lora_B @ layer.lora_A}
    A, B = (found[f"{PREFIX}{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
    wanted = layer.scaling * (layer.lora_B @ layer.lora_A - layer.start_B @ layer.start_A)
    expect(layer.scaling * B @ A, wanted, case, slips, "s·BA of what was saved", 1e-5)
    told = {key: settings.get(key) for key in ("r", "lora_alpha", "init_lora_weights")}
    slip = "the config must fit the tensors: it is adapter.config, not the model's own"
    expect(told, {"r": 4, "lora_alpha": 12, "init_lora_weights": True}, case, {slip: case}, "the config")


@EXERCISE.property("save: refused for a model without LoRA layers, and where no folder can be made")
def saving_refused(draw: Draw):
    plain = base(draw)
    with folder() as path:
        slip = "extract_adapter refuses a plain model; call it before anything is written"
        expect_error(lambda: save_adapter(plain, path), (), {"model": "no LoRA layers"}, slip)
        require(
            not path.exists(), "expected nothing to be written after the refusal", {"model": "no LoRA layers"}, slip
        )
        path.write_text("a file")
        slip = "write_adapter raises it"
        expect_error(lambda: save_adapter(adapted(draw, plain), path), (), {"directory": "a file"}, slip)


@EXERCISE.property("read: config, A and B by layer, nothing lost; the model is as before, plain or with LoRA layers")
def read_back(draw: Draw):
    several = dict(target_modules=["q_proj", "v_proj"], r=3, rank_pattern={"v_proj": 2}, lora_alpha=draw.integer(1, 9))
    for layers, settings in ((1, {}), (2, several)):
        plain = base(draw, layers)
        model = adapted(draw, plain, **settings)
        with folder() as path:
            write(path, model)
            for target, kind in ((plain, "plain"), (adapted(draw, plain), "has LoRA layers")):
                case = {"model": kind, "decoder layers": layers, **settings}
                why = "LoRA layers that the model has are no concern of the file: shapes come from GPT(model.config)"
                why = "each layer has its own r: layer_rank(config, name)" if settings else why
                adapter = accepted(target, path, case, why if settings or target is not plain else "")
                expect(asdict(adapter.config), asdict(model.lora_config), case, what="adapter.config")
                names = [name for name, _ in lora_layers(model)]
                slips = {
                    "the keys are plain layer names, without the file's prefix": sorted(f"{PREFIX}{n}" for n in names)
                }
                slips["the keys are layer names, not names of tensors"] = sorted(
                    n for n in tensors_of(model) if "A" in n
                )
                for part in ("A", "B"):
                    expect(sorted(getattr(adapter, part)), sorted(names), case, slips, f"the keys of adapter.{part}")
                    for name, layer in lora_layers(model):
                        wanted, other = (getattr(layer, f"lora_{x}").detach() for x in (part, "AB".replace(part, "")))
                        slips = {"A and B are exchanged": other, "rounded to float16": wanted.half().float()}
                        expect(getattr(adapter, part)[name], wanted, case, slips, f"{part} of {name}", 0)


@EXERCISE.property("read: another base is refused, unless force; a file without a fingerprint passes")
def another_base(draw: Draw):
    model, other = adapted(draw, base(draw)), base(draw)
    with folder() as path:
        write(path, model)
        before, case = picture(other), {"base": "another, of the same shape", "force": False}
        slip = "check_base(model, directory) compares the file's fingerprint with the model's"
        expect_error(lambda: read_adapter(other, path), (), case, slip)
        require(before == picture(other), "read_adapter changed the model it refused", case, "refuse first")
        for note, force in ((True, True), (False, False)):
            write(path, model, note=note)
            case = {"base": "another, of the same shape", "fingerprint in the file": note, "force": force}
            why = "force=True forgives another base" if note else "without a fingerprint there is nothing to compare"
            adapter = accepted(other, path, case, why, force)
            for name, layer in lora_layers(model):
                expect(adapter.A[name], layer.lora_A, case, what=f"A of {name}", tolerance=0)


@EXERCISE.property("read: every tensor that is missing, not expected or of the wrong shape is named, also with force")
def all_differences(draw: Draw):
    plain = base(draw)
    model = adapted(draw, plain, target_modules=["q_proj", "v_proj"], r=3)
    whole = tensors_of(model)
    first, *_, last = sorted(whole)
    edits = {
        "missing": ({first: None}, (first,)),
        "two missing": ({first: None, last: None}, (first, last)),
        "not expected": ({"stranger": torch.ones(2)}, ("stranger",)),
        "of the wrong shape": ({last: torch.ones(2, 2)}, (last,)),
        "one of each": ({first: None, "stranger": torch.ones(2), last: torch.ones(2, 2)}, (first, "stranger", last)),
    }
    with folder() as path:
        for fault, (edit, names) in edits.items():
            write(path, model, {name: tensor for name, tensor in {**whole, **edit}.items() if tensor is not None})
            for force in (False, True) if fault == "one of each" else (False,):
                case = {"tensors": fault, "force": force}
                slip = "check all names and shapes, then raise one ValueError that names them all; check_tensors does"
                expect_error(lambda force=force: read_adapter(plain, path, force), names, case, slip)


@EXERCISE.property("read: missing files, damaged files, other methods and unknown settings are refused")
def reading_refused(draw: Draw):
    plain = base(draw)
    model = adapted(draw, plain)
    with folder() as path:
        not_found(lambda: read_adapter(plain, path), {"folder": "missing"})
        for name in (WEIGHTS, CONFIG):
            write(path, model)
            (path / name).unlink()
            not_found(lambda: read_adapter(plain, path), {"file missing": name})
        for settings in ({"peft_type": "PREFIX_TUNING"}, {"lora_bias": True}, {"r": "2"}):
            write(path, model, **settings)
            slip = "the config asks for what we do not have; _read_config refuses it"
            expect_error(lambda: read_adapter(plain, path), (), settings, slip)
        write(path, model, target_modules=["q_proj", "nowhere"])
        slip = "a target that matches no layer: check_targets, or apply_lora on a model without data, raises it"
        expect_error(lambda: read_adapter(plain, path), ("nowhere",), {"target_modules": ["q_proj", "nowhere"]}, slip)
        write(path, model)
        (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1])
        slip = "open_safetensors and read_header turn the library's error into a ValueError"
        expect_error(lambda: read_adapter(plain, path), (), {WEIGHTS: "without its last byte"}, slip)
