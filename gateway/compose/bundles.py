"""What engines compile and measure on this node, kept from one start to the next.

A folder for each combination (``loaders.engines.vllm.compile_cache``), into which an engine's own
caches are pointed.
A model may bring such a folder along, packed, as ``tidegate-bundles/KEY.tar`` beside its weights:
then the first start here is like a second one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from loaders.engines.vllm.command import EngineCommand
from loaders.engines.vllm.compile_cache import (
    BadBundle,
    BundleKey,
    bundle_env,
    make_key,
    model_facts,
    size_of,
    unpack,
)
from loaders.engines.vllm.compile_cache import pack as pack_folder

log = logging.getLogger("tidegate.bundles")

SHIPPED = "tidegate-bundles"
"""The folder of packed bundles in a model's directory."""

FACTS = "facts.json"
MAX_BYTES = 16 << 30
"""A packed bundle that says it holds more is not unpacked."""


class Bundles:
    """The folders of one node. Thread-safe."""

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
        if key is None:
            return {}
        with self._lock:
            self._used.add(key.digest)
        self._mark(key)
        return bundle_env(self.folder(key))

    def _mark(self, key: BundleKey) -> None:
        """Note what the folder is of, and that it was used now."""
        folder = self.folder(key)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / FACTS).exists():
                (folder / FACTS).write_text(json.dumps(dict(key.facts), indent=1) + "\n")
            os.utime(folder)

    def bring(
        self, command: EngineCommand, model: Path, env: Mapping[str, str] | None = None
    ) -> int:
        """Unpack what the model has brought along for this combination, unless the folder is there;
        the bytes that were unpacked. What is no sound bundle is left alone, and said."""
        key = self.key(command, str(model), env)
        if key is None:
            return 0
        folder, shipped = self.folder(key), model / SHIPPED / f"{key.digest}.tar"
        written = 0
        if shipped.is_file() and size_of(folder) <= _size(folder / FACTS):
            shutil.rmtree(folder, ignore_errors=True)  # a mark alone, and nothing compiled
            try:
                written = unpack(shipped, folder, max_bytes=MAX_BYTES)
                log.info("%s: unpacked %d bytes of what was compiled elsewhere", shipped, written)
            except (BadBundle, OSError) as error:
                log.warning("%s is not used: %s", shipped, error)
        self._mark(key)
        self.sweep(keep=key.digest)
        return written

    def pack(
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
        if size_of(folder) <= _size(folder / FACTS):
            raise BadBundle(
                f"nothing was compiled or measured yet for {model} with these settings "
                f"(it would be in {folder}): start it once"
            )
        into.mkdir(parents=True, exist_ok=True)
        target = into / f"{key.digest}.tar"
        pack_folder(folder, target)
        return target

    def sweep(self, keep: str = "") -> int:
        """Remove what was not used for longest until the rest is within the quota; the bytes
        removed. ``keep``, and what engines of this process were given, stays."""
        with self._lock:
            found = []
            for folder in self.directory.iterdir() if self.directory.is_dir() else ():
                with contextlib.suppress(OSError):
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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
