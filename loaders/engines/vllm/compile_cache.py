"""What an engine compiles and measures when it starts, kept as one bundle that can be shipped.

A first start compiles the model (Dynamo, Inductor, Triton), tunes kernels, captures graphs and
profiles how much memory is left for the KV cache; on GPUs that is longer than reading weights. All
of it is derived from what runs where. So each combination has a directory of its own, named by a
key over everything the artefacts depend on, into which the engine's caches are pointed; packed
into one file it travels with the model. A bundle for another combination is never used: it has
another name.

A model may bring such a file along, as ``tidegate-bundles/KEY.tar`` beside its weights: then the
first start on a node is like a second one. What is in it is code that engines run (pickles, shared
libraries), so only a file is used whose SHA-256 the operator has given, and on this node only what
our own user has written.

vLLM checks its own artefacts again (its hashes go finer than our key), so one that does not fit
costs a compilation, not a wrong answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from loaders.engines.base import EngineCommand
from loaders.engines.vllm.engine import find_install, read_flags, site_packages
from modelcache.store.files import make_private
from modelcache.types import BUNDLES, CacheError

log = logging.getLogger("tidegate.bundles")

FACTS = "facts.json"
FLASHINFER = "flashinfer"
MAX_BYTES = 16 << 30
"""A packed bundle that says it holds more is not unpacked."""

KEY_FORMAT = 1
NOT_COMPILED_IN = frozenset(
    {
        "--host",
        "--port",
        "--uds",
        "--model",
        "--served-model-name",
        "--api-key",
        "--load-format",
        "--model-loader-extra-config",
        "--safetensors-load-strategy",
        "--disable-uvicorn-access-log",
        "--uvicorn-log-level",
        "--chat-template",
    }
)
"""Flags that change nothing of what is compiled or measured."""

LIBRARIES = ("torch", "triton", "flashinfer_python", "transformers")
"""Beside the engine itself, what writes or reads the artefacts."""


class BadBundle(Exception):
    """A packed bundle holds what none would: it is not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleKey:
    """Names a combination of engine, libraries, device, model and settings. ``facts`` is what
    went into ``digest``, which shows why a bundle did not fit."""

    digest: str
    facts: Mapping[str, str]


class CompileCache:
    """The bundles of one node. Thread-safe."""

    def __init__(
        self,
        directory: Path,
        *,
        python: Path,
        quota_bytes: int,
        gpus: Callable[[], Sequence[tuple[str, str]] | None],
    ) -> None:
        """``python`` is the engine's interpreter, ``gpus`` tells the name and driver of each GPU
        here (``None``: cannot tell); it is asked until it has told."""
        self.directory = directory
        self._python = python
        self._quota_bytes = quota_bytes
        self._ask_gpus = gpus
        self._gpus: Sequence[tuple[str, str]] | None = None
        self._used: set[str] = set()
        self._lock = threading.Lock()

    def key(
        self, command: EngineCommand, model: str, env: Mapping[str, str] | None = None
    ) -> BundleKey | None:
        """The combination that a command starts, with the user's own variables ``env``; ``None``
        where no engine is found, or the GPUs cannot be told now."""
        with self._lock:
            if self._gpus is None:
                self._gpus = self._ask_gpus()
            if self._gpus is None:
                return None
            gpus = sorted(set(self._gpus))
        facts = model_facts(model)
        return make_key(python=self._python, model=facts, args=command.argv[3:], env=env, gpus=gpus)

    def folder(self, key: BundleKey) -> Path:
        """Where a combination's artefacts are."""
        return self.directory / key.digest

    def env(
        self, command: EngineCommand, model: str, env: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """What points an engine's caches into its folder; empty where there is none to point to.
        The folder stays for as long as this process lives: an engine may be using it."""
        key = self.key(command, model, env)
        if key is None or not self._mark(key):
            return {}
        with self._lock:
            self._used.add(key.digest)
        return bundle_env(self.folder(key))

    def _mark(self, key: BundleKey) -> bool:
        """Note what the folder is of, and that it was used now; whether engines may run what is in
        it."""
        folder = self.folder(key)
        try:
            make_private(self.directory.parent)
            make_private(self.directory)
            for place in (folder, self.directory / FLASHINFER):
                keep_private(place)
        except (CacheError, OSError) as error:
            log.warning("what engines compile is not kept: %s", error)
            return False
        with suppress(OSError):
            if not (folder / FACTS).exists():
                (folder / FACTS).write_text(json.dumps(dict(key.facts), indent=1) + "\n")
            os.utime(folder)
        return True

    def bring(
        self,
        command: EngineCommand,
        model: Path,
        env: Mapping[str, str] | None = None,
        *,
        trusted: Mapping[str, str],
    ) -> int:
        """Unpack what the model has brought along for this combination, unless the folder is there;
        the bytes that were unpacked.

        ``trusted`` are the SHA-256 that the operator gave, by key. What is none of them, or no
        sound bundle, is left alone, and said.
        """
        key = self.key(command, str(model), env)
        if key is None or not self._mark(key):
            return 0
        folder, shipped = self.folder(key), model / BUNDLES / f"{key.digest}.tar"
        written = 0
        if shipped.is_file() and size_of(folder) <= _file_bytes(folder / FACTS):
            try:
                sha256 = trusted.get(key.digest)
                if sha256 is None:
                    raise BadBundle("modelcache.bundles gives no SHA-256 of it for this model")
                shutil.rmtree(folder, ignore_errors=True)  # a mark alone, and nothing compiled
                written = unpack(shipped, folder, sha256=sha256, max_bytes=MAX_BYTES)
                log.info("%s: unpacked %d bytes of what was compiled elsewhere", shipped, written)
            except (BadBundle, OSError) as error:
                log.warning("%s is not used: %s", shipped, error)
            self._mark(key)
        self.sweep(keep=key.digest)
        return written

    def ship(
        self, command: EngineCommand, model: str, into: Path, env: Mapping[str, str] | None = None
    ) -> Path:
        """Write a combination's folder as one file in ``into``, to be shipped as
        ``tidegate-bundles/`` with the model; the file.

        Raises ``BadBundle`` where there is nothing yet, ``OSError`` where it cannot be written.
        """
        key = self.key(command, model, env)
        if key is None:
            raise BadBundle(f"there is no vLLM at {self._python}, or its GPUs cannot be told")
        folder = self.folder(key)
        if size_of(folder) <= _file_bytes(folder / FACTS):
            raise BadBundle(
                f"nothing was compiled or measured yet for {model} with these settings "
                f"(it would be in {folder}): start it once"
            )
        into.mkdir(parents=True, exist_ok=True)
        target = into / f"{key.digest}.tar"
        pack(folder, target)
        return target

    def sweep(self, keep: str = "") -> int:
        """Remove what was not used for longest until the rest is within the quota; the bytes
        removed. ``keep``, and what engines of this process were given, stays."""
        with self._lock:
            found = []
            for folder in self.directory.iterdir() if self.directory.is_dir() else ():
                with suppress(OSError):
                    if (folder / FACTS).is_file():
                        found.append((folder.stat().st_mtime, size_of(folder), folder))
            over = sum(size for _, size, _ in found) - self._quota_bytes
            freed = 0
            for _, size, folder in sorted(found):
                if freed >= over:
                    break
                if folder.name not in {keep, *self._used}:
                    shutil.rmtree(folder, ignore_errors=True)
                    freed += size
            return freed


def make_key(
    *,
    python: Path,
    model: str,
    args: Sequence[str],
    env: Mapping[str, str] | None = None,
    gpus: Sequence[tuple[str, str]] = (),
) -> BundleKey | None:
    """The key of an engine that will be run by ``python`` with ``args`` (its command line).

    ``model`` names what of the model matters (``model_facts``), ``env`` are the user's own
    variables, ``gpus`` the (name, driver version) it will run on. ``None`` where no engine is
    found.
    """
    install = find_install(python)
    if install is None:
        return None
    facts = {
        "format": str(KEY_FORMAT),
        "engine": f"{install.distribution} {install.version} {install.device}",
        "model": model,
        "settings": json.dumps(sorted(_settings_in(args))),
        "env": json.dumps(sorted((env or {}).items())),
        "gpus": json.dumps(sorted(gpus)),
    }
    if not gpus:
        facts["cpu"] = _cpu_digest()
    for site in site_packages(python):
        facts["python"] = site.parent.name
        for name in LIBRARIES:
            found = sorted(entry.name for entry in site.glob(f"{name}-*.dist-info"))
            if found:
                facts[name] = found[-1].removesuffix(".dist-info").partition("-")[2]
    whole = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    return BundleKey(digest=whole.hexdigest()[:32], facts=facts)


def model_facts(model: str) -> str:
    """What of a model decides what is compiled for it: its configuration, wherever it lies; its
    name where it is on no disk. Weights of the same shapes share what is compiled."""
    digest = hashlib.sha256()
    found = False
    for name in ("config.json", "quantize_config.json", "hf_quant_config.json"):
        try:
            digest.update(Path(model, name).read_bytes())
        except OSError:
            continue
        digest.update(name.encode())
        found = True
    return digest.hexdigest() if found else model


def bundle_env(root: Path) -> dict[str, str]:
    """Environment variables that point every cache of an engine into ``root``, and have vLLM
    remember the memory it measured."""
    place = root.absolute()
    return {
        "VLLM_CACHE_ROOT": str(place / "vllm"),
        "VLLM_ENABLE_STARTUP_PLAN": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
        "TRITON_CACHE_DIR": str(place / "triton"),
        # Read when FlashInfer is imported, so it is one place for all that are forked from one
        # import. FlashInfer tells its own combinations apart.
        "FLASHINFER_WORKSPACE_BASE": str(place.parent / FLASHINFER),
        "CUDA_CACHE_PATH": str(place / "cuda"),
    }


def keep_private(folder: Path) -> None:
    """Make a folder of which engines run what is in it, for our user alone. One that others could
    enter is emptied unless all in it is ours and no one else may write there.

    Raises ``CacheError`` where it is another user's, ``OSError``.
    """
    if make_private(folder) and not all(map(_is_ours, _below(folder))):
        log.warning("%s: others could write there, so what was in it is removed", folder)
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _below(folder: Path) -> Iterable[Path]:
    for directory, folders, names in os.walk(folder):
        yield from (Path(directory, name) for name in (*folders, *names))


def _is_ours(path: Path) -> bool:
    seen = path.lstat()
    open_to_others = seen.st_mode & 0o022 and not stat.S_ISLNK(seen.st_mode)
    return seen.st_uid == os.geteuid() and not open_to_others


def size_of(root: Path) -> int:
    """Bytes of the files in a bundle's directory; 0 where there is none."""
    total = 0
    for path in _files(root):
        with suppress(FileNotFoundError):  # an engine is at work in it
            total += path.lstat().st_size
    return total


def pack(root: Path, target: Path) -> int:
    """Write a bundle's directory as one tar file, the same bytes for the same content.

    Links and half-written temporary files are left out. ``target`` appears whole or not at all.
    Returns its size in bytes.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as archive:
            for path in _files(root):
                entry = tarfile.TarInfo(str(path.relative_to(root)))
                with path.open("rb") as file:
                    status = os.fstat(file.fileno())
                    entry.size = status.st_size
                    entry.mode = 0o755 if status.st_mode & 0o100 else 0o644
                    archive.addfile(entry, file)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    return target.stat().st_size


def unpack(source: Path, root: Path, *, sha256: str, max_bytes: int) -> int:
    """Put a packed bundle at ``root``, unless there is one already; returns the bytes written.

    Raises ``BadBundle`` for another SHA-256, names that lead out of it, anything but plain files,
    more than ``max_bytes``, or a file that is no whole archive; ``root`` is then as it was.
    """
    if root.exists():
        return 0
    partial = root.with_name(f".{root.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    written = 0
    try:
        partial.mkdir(mode=0o700, parents=True)
        # Of a copy: the file itself could be another by the time that it is unpacked.
        with tempfile.TemporaryFile(dir=partial) as copy:
            _copy_checked(source, copy, sha256, max_bytes)
            with tarfile.open(fileobj=copy, mode="r:") as archive:
                for entry in archive:
                    written += entry.size
                    if written > max_bytes:
                        raise BadBundle(f"{source} unpacks to more than {max_bytes} bytes")
                    _unpack_one(archive, entry, partial, source)
        try:
            partial.rename(root)
        except OSError:
            if not root.exists():  # else another start was quicker, which is as good
                raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise BadBundle(f"{source} is no whole bundle: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return written


def _copy_checked(source: Path, copy: BinaryIO, sha256: str, max_bytes: int) -> None:
    digest = hashlib.sha256()
    with source.open("rb") as file:
        while data := file.read(1 << 20):
            if copy.tell() > 2 * max_bytes:  # a small file takes three blocks of an archive
                raise BadBundle(f"{source} has more than {copy.tell()} bytes")
            digest.update(data)
            copy.write(data)
    if digest.hexdigest() != sha256:
        raise BadBundle(f"its SHA-256 is {digest.hexdigest()}, modelcache.bundles says {sha256}")
    copy.seek(0)


def sha256_of(file: Path) -> str:
    """The SHA-256 of a packed bundle, as ``modelcache.bundles`` wants it."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _unpack_one(archive: tarfile.TarFile, entry: tarfile.TarInfo, root: Path, source: Path) -> None:
    name = PurePosixPath(entry.name)
    if not entry.isreg() or name.is_absolute() or ".." in name.parts or not name.parts:
        raise BadBundle(f"{source} holds {entry.name!r}, which is no plain file within it")
    content = archive.extractfile(entry)
    if content is None:
        raise BadBundle(f"{source} holds {entry.name!r} without its content")
    place = root.joinpath(*name.parts)
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("xb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
        file.flush()
        if file.tell() != entry.size:
            raise BadBundle(f"{source} ends within {entry.name!r}")
    place.chmod(0o700 if entry.mode & 0o100 else 0o600)


def _files(root: Path) -> Iterable[Path]:
    found = []
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink() and not _is_temporary(name):
                found.append(path)
    return sorted(found)


def _is_temporary(name: str) -> bool:
    return name.endswith((".tmp", ".lock", ".partial")) or name.startswith(".tmp")


def _settings_in(args: Sequence[str]) -> list[str]:
    """The flags, each with its values, that what is compiled may depend on."""
    return [" ".join(group) for group in read_flags(args) if group[0] not in NOT_COMPILED_IN]


def _cpu_digest() -> str:
    """What this machine's CPU can do: code compiled for it may not run on a lesser one."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return "unknown"
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    words = sorted((flags.group(1) if flags else "").split())
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
