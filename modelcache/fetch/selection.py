"""Which files of a listing make a model: its weights once, in the format that engines open.

A repository often has the same weights several times: as safetensors and as pickles, for other
runtimes, below ``original/``, as ``consolidated*.safetensors``, in a second precision. Where an
index of shards lies beside them (``model.safetensors.index.json``) the weights are the files that
it names, as vLLM reads them, and one that the source has not is said before anything is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from modelcache.safetensors_index import WEIGHT_MAP_LIMIT_BYTES, BadFile, parse_weight_map
from modelcache.types import BUNDLES, Listing, Manifest, NotFound, RemoteFile, SourceError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib")
"""Weights that can run code when they are read; not needed beside safetensors."""

FOREIGN = (
    *("*.onnx", "*.onnx_data*", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.mlmodel"),
    *("*.mlpackage/*", "*openvino_model.*"),
)
"""The same weights for runtimes that are none of our engines; hubs often have several of them, and
together more bytes than what is opened."""

GGUF = ("*.gguf",)
ORIGINAL = ("original/*",)
"""What the model was converted from; vLLM passes it over too."""

WEIGHTS = ".safetensors"
INDEX = ".safetensors.index.json"
MAIN_INDEXES = ("model" + INDEX, "diffusion_pytorch_model" + INDEX)
"""The index of a folder that counts is the first of these that is there."""

CONSOLIDATED = "consolidated"
"""What Mistral's own format calls its weights; they count where there are no others."""

ADAPTERS = ("adapter_model",)
"""Weights that belong to none of a folder's indexes and are not a copy of them."""

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(.*)")
_SECOND_PRECISION = re.compile(
    r"(.+?)\.(?:fp32|fp16|bf16|fp8|int8|non_ema|ema)(?:-\d{5}-of-\d{5})?"
)

ReadFile = Callable[[RemoteFile], bytes]
"""A small file of the model, whole."""


def select_files(
    files: Sequence[RemoteFile],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    bundles: Collection[str] = (),
    *,
    read: ReadFile | None = None,
    gguf: bool = False,
) -> tuple[RemoteFile, ...]:
    """The files wanted of a listing, by shell patterns over their paths.

    Without ``include``: all, but of a model that has safetensors only those, each tensor once, and
    with them no pickles, nor what other runtimes read (GGUF neither, unless ``gguf``). Of compiled
    code only the ``bundles`` named, whatever the patterns. ``read`` reads indexes of shards;
    without it no index is believed. Raises ``NotFound`` where shards are
    missing, ``BadFile`` where an index is none.
    """

    def matches(file: RemoteFile, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(file.path, pattern) for pattern in patterns)

    trusted = {f"{BUNDLES}/{name}.tar" for name in bundles}
    code = [file for file in files if file.path in trusted and not matches(file, exclude)]
    files = [file for file in files if not file.path.startswith(f"{BUNDLES}/")]
    if include:
        chosen = [file for file in files if matches(file, include)]
        return (*(file for file in chosen if not matches(file, exclude)), *code)
    safe = [file for file in files if file.path.endswith(WEIGHTS)]
    needless: tuple[str, ...] = (*PICKLES, *FOREIGN, *(() if gguf else GGUF)) if safe else ()
    if any(not matches(file, ORIGINAL) for file in safe):
        needless = (*needless, *ORIGINAL)
    chosen = [file for file in files if not matches(file, (*needless, *exclude))]
    copies = _copies(files, chosen, read)
    return (*(file for file in chosen if file.path not in copies), *code)


def _copies(
    files: Sequence[RemoteFile], chosen: Sequence[RemoteFile], read: ReadFile | None
) -> set[str]:
    """Paths of weights, and of indexes of weights, that other files of their folder have too."""
    listed = {file.path for file in files}
    folders: dict[str, dict[str, RemoteFile]] = {}
    for file in chosen:
        folder, slash, name = file.path.rpartition("/")
        if name.endswith((WEIGHTS, INDEX)):
            folders.setdefault(folder + slash, {})[name] = file
    copies: set[str] = set()
    for folder, found in folders.items():
        copies |= {folder + name for name in _copies_in(folder, found, listed, read)}
    return copies


def _copies_in(
    folder: str, found: dict[str, RemoteFile], listed: set[str], read: ReadFile | None
) -> set[str]:
    there = {path.removeprefix(folder) for path in listed if path.startswith(folder)}
    stems = {_stem(name) for name in there if name.endswith(WEIGHTS)}
    twice = bool(stems - {CONSOLIDATED, *ADAPTERS})
    indexes = MAIN_INDEXES if twice else (*MAIN_INDEXES, CONSOLIDATED + INDEX)
    index = next((name for name in indexes if name in found), None)
    if index is not None and read is not None:
        try:
            if found[index].size_bytes > WEIGHT_MAP_LIMIT_BYTES:
                raise BadFile(f"{found[index].size_bytes} bytes are no index of tensors")
            named = set(parse_weight_map(read(found[index])).values())
        except BadFile as error:
            raise BadFile(error.message, path=folder + index) from None
        _check_there(folder + index, named, there)
        kept = named | {name for name in found if name.startswith(ADAPTERS)}
        return set(found) - kept - {index}
    copies = {name for name in found if twice and name.startswith(CONSOLIDATED)}
    for name in found:
        second = _SECOND_PRECISION.fullmatch(name.removesuffix(INDEX).removesuffix(WEIGHTS))
        if second is not None and second[1] in stems:
            copies.add(name)
    _check_shards(folder, {name for name in there if name.endswith(WEIGHTS)})
    return copies


def _stem(name: str) -> str:
    """``model`` of ``model.safetensors`` and of ``model-00001-of-00002.safetensors``."""
    stem = name.removesuffix(WEIGHTS)
    shard = _SHARD.fullmatch(stem)
    return stem if shard is None else shard[1] + shard[4]


def _check_there(index: str, named: set[str], listed: set[str]) -> None:
    missing = sorted(named - listed)
    if missing:
        raise NotFound(
            f"{index} names {missing[0]}{_and_more(missing)}, which the source has not: the model "
            "is not whole there (is its upload done?)"
        )


def _check_shards(folder: str, weights: set[str]) -> None:
    """Where no index is there to say it: ``…-00001-of-00003`` needs two others."""
    sets: dict[tuple[str, int, str], set[int]] = {}
    for name in weights:
        shard = _SHARD.fullmatch(name)
        if shard is not None:
            key = (shard[1], int(shard[3]), shard[4])
            sets.setdefault(key, set()).add(int(shard[2]))
    for (before, count, after), there in sets.items():
        first = 0 if 0 in there else 1
        missing = sorted(set(range(first, count + first)) - there)
        if missing:
            shards = [f"{folder}{before}-{at:05}-of-{count:05}{after}" for at in missing]
            raise NotFound(
                f"{shards[0]}{_and_more(shards)}: the source has other shards of it and not this: "
                "the model is not whole there (is its upload done?)"
            )


def _and_more(missing: Sequence[str]) -> str:
    return f" and {len(missing) - 1} more" if len(missing) > 1 else ""


def narrow(
    listing: Listing,
    url: str,
    earlier: Manifest | None,
    include: Sequence[str],
    exclude: Sequence[str],
    bundles: Collection[str] = (),
    *,
    read: ReadFile | None = None,
    gguf: bool = False,
) -> Listing:
    """The files wanted of a model at ``url``, with those that were wanted ``earlier``: asking for
    fewer loses none. Raises ``NotFound`` where patterns leave nothing, or a shard is missing."""
    try:
        chosen = select_files(listing.files, include, exclude, bundles, read=read, gguf=gguf)
    except NotFound as error:
        raise NotFound(f"{url}: {error}") from None
    except BadFile as error:
        raise SourceError(f"{url}: {error}") from None
    if listing.files and not chosen:
        patterns = ", ".join([*include, *(f"!{one}" for one in exclude)])
        raise NotFound(f"{url}: none of its {len(listing.files)} files is wanted by {patterns}")
    paths = {file.path for file in chosen}
    held = earlier.files if earlier is not None else ()
    paths |= {one.path for one in held if not one.path.startswith(f"{BUNDLES}/")}
    return replace(listing, files=tuple(file for file in listing.files if file.path in paths))
