"""Damaged and hostile files for every reader: `python tests/faults/mutations.py --count 5000 --seed 0`.

Each trial takes one reader's small files, changes one of them, and loads. A load may succeed, with finite tensors, or
raise ValueError or FileNotFoundError with a message that names the file (or its folder), within LIMIT seconds. All else
is a fault. A seed and a number give the same trial again: `--only gguf --first 812 --count 1 --verbose`.
"""

# ruff: noqa: E402 (as a script, this file does not find the modules beside its folder by itself)

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from gguf_files import TEMPLATE, alphabet, write_gguf

from minilora.adapters.inject import apply_lora, lora_layers
from minilora.adapters.prompts import PrefixTuning, SoftPrompt
from minilora.config import LoRAConfig
from minilora.linear4bit import quantize_model, quantized_layers
from minilora.model import GPT, GPTConfig
from minilora.quant import Quantization
from minilora.storage.adapters import load_adapter, save_adapter
from minilora.storage.config import load_config
from minilora.storage.files import open_safetensors, write_safetensors
from minilora.storage.gguf import close_gguf
from minilora.storage.models import load_model, save_model
from minilora.storage.prompts import load_prompt, save_prompt
from minilora.storage.training_state import load_training_state, save_training_state
from minilora.text.instructions import read_lines
from minilora.text.tokenizer import open_tokenizer, train_tokenizer
from minilora.train import make_optimizer
from minilora.train_settings import TrainConfig

LIMIT = 5.0  # seconds for one load of a model of a few kilobytes
OUTCOMES = "loaded", "refused", "other exception", "hang", "NaN taken", "file not named"
FAULTS = OUTCOMES[2:]
SHAPE = dict(vocab_size=262, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
SHAPE |= dict(num_key_value_heads=1, max_position_embeddings=64)

# Values for any place in a JSON file, as text, since some of them no JSON writer gives.
DIGITS, DEEP = "9" * 400, "[" * 20000 + "]" * 20000
NUMBERS = [
    "0",
    "-1",
    "1",
    "3",
    "2",
    "0.5",
    "1e-320",
    "1e999",
    "-0.5",
    "NaN",
    "Infinity",
    "-Infinity",
    DIGITS,
    "9" * 5000,
]
NUMBERS += ["1000000", "1000000", "1000000000", str(2**40), str(2**60), str(2**63), "1e300", "true", "null"]
PATTERNS = ["(.+)+z", "(.*)*z", "(.|.)*z", ".*" * 12 + "z", ".?" * 40 + "z", "(((", "*", "a{99999999999}", "(" * 2000]
PATTERNS += ["a|" * 9000, "x" * 100000, "(?i)q_proj", "q_proj)|(.*"]
WORDS = ["", "x", "\ud800", "\0", "../x", "lora", "all-linear", "x" * 100000, *PATTERNS]
OTHERS = [
    "null",
    "true",
    "false",
    "[]",
    "{}",
    "[null]",
    "[[1]]",
    DEEP,
    '{"a": 1, "a": 2}',
    '["q_proj", 1]',
    '["lm_head"]',
]
OTHERS += ['{"rope_type": "linear", "factor": 1e-320}', '{"q_proj": true}', f'{{"q_proj": {DIGITS}}}', '{"type": []}']
OTHERS += [json.dumps({pattern: 4}) for pattern in PATTERNS] + [json.dumps(["q_proj"] * 200000)]
HOSTILE = NUMBERS + [json.dumps(word) for word in WORDS] + OTHERS
# Fields that a reader knows and the small files do not have.
MORE_FIELDS = ["rope_scaling", "rope_parameters", "quantization_config", "layers_to_transform", "layers_pattern"]
MORE_FIELDS += [
    "modules_to_save",
    "eos_token_id",
    "torch_dtype",
    "loftq_config",
    "init_lora_weights",
    "model_max_length",
]
MORE_FIELDS += ["chat_template", "added_tokens_decoder", "num_virtual_tokens", "alpha_pattern", "rank_pattern"]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "X"]


@dataclass
class Reader:
    folder: Path
    load: Callable[[Path], Iterable[Tensor]]  # the tensors that came out, to be held finite


def model(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SHAPE, **changes}))


def tensors_of(model: GPT) -> list[Tensor]:
    dense = [layer.quantized.absmax() for layer in quantized_layers(model).values()]
    return [*model.parameters(), *model.buffers(), *dense]


def tokenizer_json() -> str:
    vocab = {letter: id for id, letter in enumerate(["<|end|>", *alphabet(), "th"])}
    end = {"id": 0, "content": "<|end|>", "single_word": False, "lstrip": False, "rstrip": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    definition = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None}
    definition |= {"added_tokens": [{**end, "normalized": False, "special": True}], "pre_tokenizer": byte_level}
    return json.dumps(definition | {"decoder": byte_level, "model": bpe | {"vocab": vocab, "merges": [["t", "h"]]}})


def readers(home: Path) -> dict[str, Reader]:
    """Writes every reader's small files under `home`."""
    base, found = model(), {}

    def add(name: str, load: Callable[[Path], Iterable[Tensor]]) -> Path:
        found[name] = Reader(home / name, load)
        (home / name).mkdir(parents=True)
        return home / name

    save_model(base, add("model", lambda folder: tensors_of(load_model(folder))))
    shards = add("shards", lambda folder: tensors_of(load_model(folder)))
    shutil.copy(home / "model" / "config.json", shards)
    with open_safetensors(home / "model" / "model.safetensors") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    halves, weight_map = (list(tensors)[::2], list(tensors)[1::2]), {}
    for number, names in enumerate(halves, 1):
        write_safetensors(shards / f"part-{number}.safetensors", {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, f"part-{number}.safetensors")
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for scheme, double in (("nf4", True), ("int4", False)):
        quantized = quantize_model(model(), Quantization(scheme, 16, double))
        save_model(quantized, add(f"4bit-{scheme}", lambda folder: tensors_of(load_model(folder))))

    def load_onto_base(folder: Path) -> list[Tensor]:
        return tensors_of(load_adapter(model(), folder))

    for name, dora in (("lora", False), ("dora", True)):
        settings = dict(target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 3}, use_dora=dora)
        adapted = apply_lora(model(), LoRAConfig(r=2, alpha_pattern={"q_proj": 8}, **settings))
        for _, layer in lora_layers(adapted):
            layer.lora_B.data.normal_()
        save_adapter(adapted, add(name, load_onto_base))
    save_prompt(SoftPrompt(model(), 3), add("prompt", lambda folder: load_prompt(model(), folder).parameters()))
    save_prompt(PrefixTuning(model(), 3), add("prefix", lambda folder: load_prompt(model(), folder).parameters()))

    config, settings = TrainConfig(5, 1, 0.01, save_every=1), {"steps": 5, "betas": [0.9, 0.95]}

    def trained() -> tuple[GPT, torch.optim.Optimizer]:
        adapted = apply_lora(model(), LoRAConfig(r=2, target_modules=["q_proj"]))
        return adapted, make_optimizer(adapted, config)

    def load_state(folder: Path) -> list[Tensor]:
        adapted, optimizer = trained()
        load_training_state(folder / "state.safetensors", adapted, optimizer, settings)
        return [*adapted.parameters(), *(tensor for state in optimizer.state.values() for tensor in state.values())]

    adapted, optimizer = trained()
    for _ in range(2):
        adapted(torch.arange(8)[None]).mean().backward()
        optimizer.step()
    history = {"train_loss": [[0, 3.0], [1, 2.5]], "validation_loss": [[0, 3.0]], "step_seconds": [0.1, 0.1]}
    state = add("state", load_state) / "state.safetensors"
    save_training_state(state, adapted, optimizer, 2, history | {"tokens": 16}, settings)

    def only_config(folder: Path) -> list[Tensor]:
        load_config(folder)
        return []

    shutil.copy(home / "model" / "config.json", add("config", only_config))

    def words(folder: Path) -> list[Tensor]:
        tokenizer = open_tokenizer(next(folder.glob("*.gguf"), folder))
        tokenizer.decode(tokenizer.encode("the cat, 12"))
        return []

    pieces = add("tokenizer.model", words)
    train_tokenizer([f"the cat sat on mat {n}" for n in range(50)], pieces / "tokenizer.model", vocab_size=290)
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE.replace("<|end|>", "</s>")}
    (pieces / "tokenizer_config.json").write_text(json.dumps(names))
    (pieces / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    text_tokenizer = open_tokenizer(pieces)

    def lines(folder: Path) -> list[Tensor]:
        read_lines(folder / "lines.jsonl", text_tokenizer, 512)
        return []

    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    entries = [{"prompt": f"Say {n}", "completion": f"{n}"} for n in range(3)] + [{"messages": chat}]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (add("instructions", lines) / "lines.jsonl").write_text(text)
    if find_spec("tokenizers"):
        folder = add("tokenizer.json", words)
        (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    if find_spec("gguf"):

        def load_gguf(folder: Path) -> list[Tensor]:
            close_gguf()
            try:
                return tensors_of(load_model(folder / "model.gguf"))
            finally:
                close_gguf()

        write_gguf(add("gguf", load_gguf) / "model.gguf", base)
        write_gguf(add("gguf-q8", load_gguf) / "model.gguf", model(hidden_size=32, intermediate_size=64), "Q8_0")
        if find_spec("tokenizers"):
            write_gguf(add("gguf-tokenizer", words) / "model.gguf", model(num_hidden_layers=1))
    return found


# Mutations: bytes of a file -> other bytes


def flip_bytes(data: bytes, dice: random.Random) -> bytes:
    """One to eight bytes, every second time in the first part, where headers are."""
    changed = bytearray(data)
    end = len(changed) if dice.random() < 0.5 else min(len(changed), 2000)
    for _ in range(dice.choice([1, 1, 2, 8])):
        changed[dice.randrange(end)] = dice.choice([0, 255, 127, 128, dice.randrange(256)])
    return bytes(changed)


def truncate(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.choice([0, 1, 7, 8, 9, len(data) - 1, dice.randrange(len(data))])]


def lengthen(data: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(data))
    return data[:place] + dice.randbytes(dice.choice([1, 8, 1000])) + data[place:]


def put_nan(data: bytes, dice: random.Random) -> bytes:
    """NaN, an infinity or a huge number over four aligned bytes, as a float32 has them."""
    value = dice.choice([math.nan, math.inf, -math.inf, 3e38, -3e38, -1.0, 0.0])
    place = dice.randrange(8, max(9, len(data) - 4))
    place += (len(data) - place) % 4
    return data[:place] + struct.pack("<f", value) + data[place + 4 :]


def put_count(data: bytes, dice: random.Random) -> bytes:
    """Another number where a count of eight bytes may stand, as GGUF's header has them."""
    counts = [at for at in range(min(len(data) - 8, 9000)) if 0 < struct.unpack_from("<Q", data, at)[0] < 2000]
    place = dice.choice(counts or [0])
    number = dice.choice([0, 1, 2, 9, 1000000, 2**31, 2**40, 2**60, 2**64 - 1])
    return data[:place] + struct.pack("<Q", number) + data[place + 8 :]


def places(value, path=()) -> list[tuple]:
    """The way to each value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, each in inner for found in [(*path, key), *places(each, (*path, key))]]


def hostile(old, dice: random.Random) -> str:
    """A value for the place of `old`, every second time one of its own kind."""
    if dice.random() < 0.5 and isinstance(old, (int, float)):
        return dice.choice(NUMBERS)
    if dice.random() < 0.5 and isinstance(old, str):
        return json.dumps(dice.choice(WORDS))
    return dice.choice(HOSTILE)


def edit_json(text: str, dice: random.Random) -> str:
    """One value, somewhere, becomes a hostile one, goes, comes twice or is new."""
    value = json.loads(text)
    way = dice.choice(places(value) or [()])
    if not way or not isinstance(value, dict):
        return dice.choice(HOSTILE)
    if dice.random() < 0.5:  # the outermost fields are the reader's own
        way = way[:1]
    *outer, key = way
    owner = value
    for step in outer:
        owner = owner[step]
    old = owner[key]
    kind = dice.choice(["swap", "swap", "swap", "swap", "remove", "twice", "more", "whole"])
    if kind == "whole":
        return dice.choice(HOSTILE)
    if kind == "remove":
        del owner[key]
    elif kind == "more":
        value[dice.choice(MORE_FIELDS)] = "@hostile@"
    elif kind == "twice" and isinstance(owner, dict):
        owner["@twice@"] = owner[key]
        return json.dumps(value).replace('"@twice@"', json.dumps(key))
    else:
        owner[key] = "@hostile@"
    return json.dumps(value).replace('"@hostile@"', hostile(old, dice))


def mutate_json(data: bytes, dice: random.Random) -> bytes:
    if dice.random() < 0.15:
        return dice.choice([flip_bytes, truncate, lengthen])(data, dice)
    return edit_json(data.decode(), dice).encode()


def mutate_lines(data: bytes, dice: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    place = dice.randrange(len(lines))
    lines[place] = mutate_json(lines[place], dice) + b"\n"
    return b"".join(lines)


def edit_header(data: bytes, dice: random.Random) -> bytes:
    """The JSON in front of a safetensors file: a tensor's type, shape, place or name, or one of the notes."""
    length = struct.unpack("<Q", data[:8])[0]
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    notes = header.get("__metadata__", {})
    names = [name for name in header if name != "__metadata__"]
    name = dice.choice(names)
    kind = dice.choice(
        ["dtype", "shape", "turn", "offsets", "rename", "swap", "remove", "note", "note", "note", "text"]
    )
    if kind == "dtype":
        header[name]["dtype"] = dice.choice(DTYPES)
    elif kind == "shape":
        header[name]["shape"] = dice.choice([[], [0], [2**40, 2**40], [-1], [1, *header[name]["shape"]], None])
    elif kind == "turn":
        header[name]["shape"] = header[name]["shape"][::-1]
    elif kind == "offsets":
        header[name]["data_offsets"] = [dice.choice([0, -1, 2**63, 8]), dice.choice([0, 8, len(numbers), 2**64])]
    elif kind == "rename":
        header[dice.choice([name + "x", "", "lm_head.weight", "model.layers.7.mlp.up_proj.weight"])] = header.pop(name)
    elif kind == "swap":
        other = dice.choice(names)
        header[name], header[other] = header[other], header[name]
    elif kind == "remove":
        del header[name]
    elif kind == "note" and notes:
        note = dice.choice(list(notes))
        try:
            notes[note] = edit_json(notes[note], dice)
        except ValueError:  # a note that is no JSON
            notes[note] = dice.choice(HOSTILE)
    text = (edit_json(json.dumps(header), dice) if kind == "text" else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def edit_state(data: bytes, dice: random.Random) -> bytes:
    """The JSON of a 4-bit layer's quant state, kept at its length; other files have none."""
    states = [match.span() for match in re.finditer(rb'\{"quant_type".*?\}', data)]
    if not states:
        return put_nan(data, dice)
    start, end = dice.choice(states)
    text = edit_json(data[start:end].decode(), dice).encode()[: end - start]
    return data[:start] + text.ljust(end - start) + data[end:]


MUTATIONS = {
    ".safetensors": [flip_bytes, truncate, lengthen, put_nan, put_nan, edit_header, edit_header, edit_state],
    ".gguf": [flip_bytes, flip_bytes, put_count, put_count, truncate, lengthen, put_nan],
    ".json": [mutate_json],
    ".jsonl": [mutate_lines],
    ".model": [flip_bytes, truncate, lengthen],
}


def mutate(path: Path, others: list[Path], dice: random.Random) -> bytes:
    """Now and then another file of the same kind; else one mutation."""
    if others and dice.random() < 0.05:
        return dice.choice(others).read_bytes()
    return dice.choice(MUTATIONS[path.suffix])(path.read_bytes(), dice)


class Hang(BaseException):
    pass


@contextmanager
def time_limit(seconds: float):
    """Raises Hang after so many seconds, where the system has an alarm clock."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(reader: Reader, folder: Path) -> tuple[str, str]:
    """Loads what lies in `folder`: the outcome, and what was said."""
    began = time.perf_counter()
    try:
        with time_limit(LIMIT), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = list(reader.load(folder))
    except Hang:
        return "hang", f"over {LIMIT:g} seconds"
    except (ValueError, FileNotFoundError) as error:
        outcome = "refused" if str(folder) in str(error) else "file not named"
        message = f"{type(error).__name__}: {error}".replace(str(folder), "FOLDER")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in a library of Rust is no Exception
        outcome, message = "other exception", f"{type(error).__name__}: {error}"
    else:
        finite = all(tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point())
        outcome, message = ("loaded", "") if finite else ("NaN taken", "")
    if time.perf_counter() - began > 2 * LIMIT:
        return "hang", message
    return outcome, message


def run(count: int, seed: int = 0, only: str = "", first: int = 0) -> Iterable[tuple[str, int, str, str, str]]:
    """Gives (reader, trial, what was changed, outcome, message) of each trial, the readers in turn."""
    with tempfile.TemporaryDirectory() as home:
        kinds = readers(Path(home) / "files")
        everything = [path for reader in kinds.values() for path in sorted(reader.folder.iterdir())]
        kinds = {name: reader for name, reader in kinds.items() if only in ("", name)}
        for name, reader in kinds.items():  # as they are, all must load
            outcome = judge(reader, reader.folder)
            if outcome[0] != "loaded":
                raise AssertionError(f"{name} does not load before anything is changed: {outcome}")
        for trial in range(first, first + count):
            name = list(kinds)[trial % len(kinds)]
            reader, dice = kinds[name], random.Random(f"{seed} {name} {trial}")
            path = dice.choice(sorted(reader.folder.iterdir()))
            others = [other for other in everything if other.suffix == path.suffix and other != path]
            folder = Path(home) / "trial"
            shutil.copytree(reader.folder, folder)
            (folder / path.name).write_bytes(mutate(path, others, dice))
            outcome, message = judge(reader, folder)
            shutil.rmtree(folder)
            yield name, trial, path.name, outcome, message


def table(counts: dict[str, Counter]) -> str:
    names = [*counts, "all"]
    total = sum(counts.values(), Counter())
    rows = [["", *OUTCOMES], *([name, *(str((counts | {"all": total})[name][o]) for o in OUTCOMES)] for name in names)]
    return "\n".join(f"{row[0]:16}" + "".join(f"{cell:>17}" for cell in row[1:]) for row in rows)


def limit_memory(gigabytes: int):
    """A load that wants everything must fail, and not the machine."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="one reader, by name")
    parser.add_argument("--first", type=int, default=0, help="the number of the first trial")
    parser.add_argument("--verbose", action="store_true", help="print every trial, not the faults alone")
    options = parser.parse_args()
    limit_memory(12)
    torch.set_num_threads(1)
    counts: dict[str, Counter] = {}
    for name, trial, file, outcome, message in run(options.count, options.seed, options.only, options.first):
        counts.setdefault(name, Counter())[outcome] += 1
        if options.verbose or outcome in FAULTS:
            print(f"{name} {trial}, {file}: {outcome}: {message[:300]}", flush=True)
    print(table(counts))
    return int(any(count[fault] for count in counts.values() for fault in FAULTS))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
