"""A soft prompt or a prefix on disk, in PEFT's layout: `adapter_config.json`, and one tensor beside it.

A prompt is a few kilobytes, and means even less without its base than a LoRA adapter does: n vectors of the right width
fit any model of that width. So the config's numbers (layers, heads, widths) are held against the model's, and the
file's note of its base against the model's fingerprint, before anything is loaded.
"""

from pathlib import Path

from torch import nn

from minilora.adapters.prompts import PrefixTuning, Prompt, SoftPrompt, check_prompt
from minilora.model import GPT
from minilora.storage.files import check_finite, check_tensors, naming, open_safetensors, read_json, shown
from minilora.storage.models import check_type, read_header
from minilora.storage.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_base, check_foreign, peft_type, write_adapter

TENSOR = "prompt_embeddings"
PROMPTS: dict[str, type[Prompt]] = {"PROMPT_TUNING": SoftPrompt, "PREFIX_TUNING": PrefixTuning}

# Fields that say where a prompt comes from and how it began, not what it computes. An MLP in front of a prefix
# (prefix_projection) is among these, because PEFT writes the keys and values that came out of it.
PAST_FIELDS = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"}
PAST_FIELDS |= {"tokenizer_kwargs", "prefix_projection", "encoder_hidden_size", "init_weights"}


def save_prompt(prompt: Prompt, directory: str | Path, overwrite: bool = False):
    """Writes a SoftPrompt's or a PrefixTuning's numbers in float32, with the fingerprint of their base.

    overwrite: also in place of a model. Raises ValueError for another module, for a folder that holds a model, and for
    one that cannot be written.
    """
    method = next((name for name, kind in PROMPTS.items() if isinstance(prompt, kind)), None)
    if method is None:
        raise ValueError(f"save_prompt writes a SoftPrompt or a PrefixTuning, and this is a {type(prompt).__name__}")
    model = prompt.base_model
    settings = {"peft_type": method, "num_virtual_tokens": prompt.length, **_sizes(method, model)}
    settings |= {"prompt_tuning_init": "RANDOM"} if method == "PROMPT_TUNING" else {"prefix_projection": False}
    write_adapter(model, directory, {TENSOR: prompt.prompt_embeddings.float()}, settings, overwrite)


def load_prompt(model: GPT, directory: str | Path, force: bool = False) -> Prompt:
    """Puts a saved prompt in front of a plain model, and freezes the model: a SoftPrompt or a PrefixTuning.

    `force` loads a prompt whose file names another base than this model. Raises FileNotFoundError for a missing folder
    or file, and ValueError for another method, another base, sizes that are not the model's, settings we do not have,
    tensors that are missing, extra, mis-shaped or not finite, a truncated file, and as the wrapper does. Errors change
    nothing.
    """
    directory = Path(directory)
    method, path = peft_type(directory), directory / ADAPTER_WEIGHTS
    if method not in PROMPTS:
        other = "; load_adapter loads it" if method == "LORA" else ""
        raise ValueError(f"{directory} holds an adapter of {method}, and load_prompt knows {', '.join(PROMPTS)}{other}")
    length = _read_length(directory / ADAPTER_CONFIG, method, model)
    if not force:
        check_base(model, directory)
    header = read_header(path)
    for name, (kind, _) in header.items():
        check_type(name, kind, path)
    expected = {TENSOR: (length, PROMPTS[method].width(model.config))}
    check_tensors(directory, expected, {name: shape for name, (_, shape) in header.items()})
    with open_safetensors(path) as file:
        numbers = file.get_tensor(TENSOR).float()
    check_finite(numbers, TENSOR, path)
    prompt = PROMPTS[method](model, 0)
    prompt.prompt_embeddings = nn.Parameter(numbers.to(prompt.prompt_embeddings.device))
    return prompt


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
    check_foreign(settings, {"peft_type", "num_virtual_tokens", *sizes, *PAST_FIELDS}, path)
    found = {key: settings.get(key) for key in sizes}  # PEFT fills in from the model what is missing here
    fits = {key: found[key] is None or (type(found[key]), found[key]) == (int, size) for key, size in sizes.items()}
    wrong = [f"{key} {shown(found[key])} (here {size})" for key, size in sizes.items() if not fits[key]]
    if wrong:
        raise ValueError(f"{path} is of another shape than this model: {', '.join(wrong)}")
    length = settings.get("num_virtual_tokens")
    if type(length) is not int:
        raise ValueError(f"{path} has num_virtual_tokens {shown(length)}, which is not a whole number")
    with naming(path):
        check_prompt(model, length)
    return length
