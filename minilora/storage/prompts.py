"""A soft prompt or a prefix on disk, in PEFT's layout: `adapter_config.json`, and one tensor beside it.

A prompt is a few kilobytes, and means even less without its base than a LoRA adapter does: n vectors of the right width
fit any model of that width. So the file carries the fingerprint of its base here too, and the config's numbers (layers,
heads, widths) are held against the model's before anything is loaded.
"""

import json
from pathlib import Path

from torch import nn

from minilora.adapters.prompts import PrefixTuning, Prompt, SoftPrompt, check_prompt
from minilora.model import GPT
from minilora.storage.adapters import CONFIG, FINGERPRINT, QUANTIZATION, WEIGHTS, quantization_of
from minilora.storage.files import open_safetensors, read_json
from minilora.storage.models import check_directory, check_tensors, check_type, fingerprint, read_header, write_pair

TENSOR = "prompt_embeddings"
METHODS = {"PROMPT_TUNING": SoftPrompt, "PREFIX_TUNING": PrefixTuning}
LOADERS = {"LORA": "load_adapter", **dict.fromkeys(METHODS, "load_prompt")}

# What a file says beside the numbers that must fit the model: where it comes from and how it began, not what it
# computes. An MLP in front of a prefix (prefix_projection) is among these: PEFT writes what came out of it.
IGNORED = {"task_type", "base_model_name_or_path", "inference_mode", "auto_mapping", "revision", "peft_version"}
IGNORED |= {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
IGNORED |= {"prefix_projection", "encoder_hidden_size", "init_weights"}


def save_prompt(prompt: Prompt, directory: str | Path):
    """Writes a SoftPrompt's or a PrefixTuning's numbers in float32, with the fingerprint of their base.

    Raises ValueError for another module and for a folder that cannot be written.
    """
    method = next((name for name, kind in METHODS.items() if isinstance(prompt, kind)), None)
    if method is None:
        raise ValueError(f"save_prompt writes a SoftPrompt or a PrefixTuning, and this is a {type(prompt).__name__}")
    model = prompt.base_model
    metadata = {"format": "pt", FINGERPRINT: fingerprint(model)}
    if quantization := quantization_of(model):
        metadata[QUANTIZATION] = json.dumps(quantization)
    settings = {"peft_type": method, "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True}
    settings |= {"num_virtual_tokens": prompt.length, **_sizes(method, model)}
    settings |= {"prompt_tuning_init": "RANDOM"} if method == "PROMPT_TUNING" else {"prefix_projection": False}
    write_pair(Path(directory), WEIGHTS, {TENSOR: prompt.prompt_embeddings.float()}, metadata, CONFIG, settings)


def load_prompt(model: GPT, directory: str | Path, force: bool = False) -> Prompt:
    """Puts a saved prompt in front of a plain model, and freezes that: a SoftPrompt or a PrefixTuning.

    `force` loads a prompt whose file names another base than this model. Raises FileNotFoundError for a missing folder
    or file, and ValueError for another method, sizes that are not the model's, settings we do not have, tensors that
    are missing, extra or mis-shaped, a truncated file, another base, and what the wrapper refuses. The model is then
    as it was.
    """
    directory = Path(directory)
    method = method_of(directory)
    if method not in METHODS:
        other = f"; {LOADERS[method]} loads it" if method in LOADERS else ""
        raise ValueError(f"{directory} holds an adapter of {method}, and load_prompt knows {', '.join(METHODS)}{other}")
    length = _read_length(directory / CONFIG, method, model)
    header = read_header(directory / WEIGHTS)
    for name, (kind, _) in header.items():
        check_type(name, kind, directory / WEIGHTS)
    expected = {TENSOR: (length, METHODS[method].width(model.config))}
    check_tensors(directory, expected, {name: shape for name, (_, shape) in header.items()})
    with open_safetensors(directory / WEIGHTS) as file:
        base, numbers = (file.metadata() or {}).get(FINGERPRINT), file.get_tensor(TENSOR)
    if base is not None and not force and base != fingerprint(model):
        raise ValueError(f"{directory} was trained on another base than this model; force=True loads it all the same")
    prompt = METHODS[method](model, 0)
    prompt.prompt_embeddings = nn.Parameter(numbers.float().to(prompt.prompt_embeddings.device))
    return prompt


def method_of(directory: str | Path) -> str:
    """The peft_type of a saved adapter: "LORA", "PROMPT_TUNING", "PREFIX_TUNING", or one that nothing here loads.

    Raises FileNotFoundError for a missing folder or config, and ValueError for a config that names no method.
    """
    check_directory(Path(directory))
    path = Path(directory) / CONFIG
    method = read_json(path).get("peft_type")
    if not isinstance(method, str):
        raise ValueError(f"{path} has the peft_type {method!r}, which is not the name of a method")
    return method


def _sizes(method: str, model: GPT) -> dict[str, int]:
    """The numbers that must be the model's. PEFT counts a prefix's heads, and their width, as keys have them."""
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size
    if method == "PREFIX_TUNING":
        heads, width = config.num_key_value_heads, config.num_key_value_heads * config.head_dim
    layers = config.num_hidden_layers
    return {"token_dim": width, "num_attention_heads": heads, "num_layers": layers, "num_transformer_submodules": 1}


def _read_length(path: Path, method: str, model: GPT) -> int:
    """Checks the config against the model; returns the virtual tokens."""
    settings, sizes = read_json(path), _sizes(method, model)
    known = {"peft_type", "num_virtual_tokens", *sizes, *IGNORED}
    on = [f"{key} {value!r}" for key, value in settings.items() if key not in known and value]
    if on:
        raise ValueError(f"{path} has settings that are not supported: {', '.join(on)}")
    # PEFT fills in what is missing from the model.
    wrong = [
        f"{key} {settings[key]!r} (here {size})" for key, size in sizes.items() if settings.get(key) not in (None, size)
    ]
    if wrong:
        raise ValueError(f"{path} is of another shape than this model: {', '.join(wrong)}")
    length = settings.get("num_virtual_tokens")
    if type(length) is not int:
        raise ValueError(f"{path} has num_virtual_tokens {length!r}, which is not a whole number")
    try:
        check_prompt(model, length)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return length
