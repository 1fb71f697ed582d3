"""The load format ``tidegate`` for vLLM, registered through vLLM's plugin entry points.

It is vLLM's own default loader with our reader of safetensors files under it. Whatever our reader
does not do (other file formats, vLLM's filters and options) is left to vLLM's own; a file that is
damaged is an error, never a reason to try another reader on it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

LOAD_FORMAT = "tidegate"
ENTRY_POINT = "loaders.engines.vllm.load_format:register"

Iterate = Callable[[list[str]], Iterator[tuple[str, Any]]]


def register() -> None:
    """Make the load format known to vLLM. Called by vLLM, in each of its processes."""
    from vllm.model_executor import model_loader

    known = getattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", {})
    if LOAD_FORMAT not in known:
        model_loader.register_model_loader(LOAD_FORMAT)(make_loader_class())


def make_loader_class() -> type:
    """The loader; made here because its base class is vLLM's, and vLLM is imported late."""
    from vllm.logger import init_logger
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    log = init_logger(f"vllm.{__name__}")

    class TidegateLoader(DefaultModelLoader):  # type: ignore[misc]
        """vLLM's default loader, reading safetensors through ``loaders.iterate``."""

        def __init__(self, load_config: Any) -> None:
            # "auto" is how the default loader looks for files; its validators have run already.
            super().__init__(replace(load_config, load_format="auto"))
            self._copies: Any = None

        def load_weights(self, model: Any, model_config: Any) -> None:
            """vLLM's, with what it copies to a CPU copied there straight from cached files."""
            with copies_to(model) as self._copies:
                super().load_weights(model, model_config)

        def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, Any]]:
            theirs = super()._get_weights_iterator
            why = self._why_not(source)
            if why is None:
                if not getattr(self, "counter_before_loading_weights", 0.0):
                    self.counter_before_loading_weights = time.perf_counter()
                _, files, is_safetensors, _ = self._prepare_weights(
                    source.model_or_path,
                    source.subfolder,
                    source.revision,
                    source.fall_back_to_pt,
                    source.allow_patterns_overrides,
                )
                weights = (
                    read_files(files, copies=self._copies) if is_safetensors else "not safetensors"
                )
                if not isinstance(weights, str):
                    log.info("Loading weights with load format tidegate: %d files", len(files))
                    return ((source.prefix + name, tensor) for name, tensor in weights)
                why = weights
            log.info("Loading weights with vLLM's own reader: %s", why)
            own: Iterator[tuple[str, Any]] = theirs(source)
            return own

        def _why_not(self, source: Any) -> str | None:
            """What of vLLM's options our reader does not know, or ``None``."""
            config = self.load_config
            for reason, asked in (
                ("model_loader_extra_config is set", config.model_loader_extra_config),
                (
                    "safetensors_load_strategy is set",
                    config.safetensors_load_strategy not in (None, "lazy"),
                ),
                ("an expert filter is active", self.local_expert_ids is not None),
                ("a part of the model is left out", source.is_unused_weight is not None),
                (
                    "a part of the model is left out",
                    getattr(self, "_encoder_only_lm_prefixes", None) is not None,
                ),
            ):
                if asked:
                    return reason
            return None

    return TidegateLoader


@contextmanager
def copies_to(model: Any) -> Iterator[Any]:
    """``in_place_copies`` where the whole model is on the CPU; ``None`` elsewhere."""
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        yield None
        return
    try:
        reader = importlib.import_module("loaders.weights.load")
    except ImportError:  # read_files says so
        yield None
        return
    with reader.in_place_copies() as copies:
        yield copies


def read_files(
    files: Sequence[str], iterate: Iterate | None = None, *, copies: Any = None
) -> Iterator[tuple[str, Any]] | str:
    """The tensors of safetensors files, or why our reader is not to be had. ``copies`` is what
    ``copies_to`` gave.

    The first tensor is read at once, so that a reader that cannot work here is known before any
    weight is in place. Errors in a file are raised.
    """
    if iterate is None:
        try:
            ours = importlib.import_module("loaders.weights.load").iterate
        except (ImportError, AttributeError) as error:
            return str(error)
        iterate = partial(ours, copies=copies)
    tensors = iter(iterate(list(files)))
    try:
        first = next(tensors)
    except StopIteration:
        return "there are no tensors"
    except (ImportError, NotImplementedError) as error:  # torch's word for a device that cannot
        return str(error)
    return chain([first], tensors)
