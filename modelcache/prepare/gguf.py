"""Makes a safetensors checkpoint of a GGUF file. Needs torch and transformers (the engine's)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelcache.types import CacheError

Say = Callable[[str], None]


def convert_gguf(
    source: Path, target: Path, *, dtype: str = "bfloat16", say: Say, sampling: dict[str, Any]
) -> None:
    """Write ``source`` as a safetensors checkpoint, with tokenizer and chat template, into
    ``target``, undoing its quantization. ``sampling`` goes into its ``generation_config.json``.

    Takes the model in ``dtype`` of memory. Raises ``CacheError`` where something is missing.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    say("importing transformers")
    try:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise CacheError(f"this environment cannot convert a GGUF file: {error}") from error
    transformers.utils.logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    say("reading the tokenizer")
    tokenizer: Any = AutoTokenizer.from_pretrained(**place)
    say("reading the weights and undoing their quantization")
    model: Any = AutoModelForCausalLM.from_pretrained(
        **place, quantization_config=GgufConfig(dequantize=True), dtype=getattr(torch, dtype)
    )
    model.generation_config.update(**sampling)
    say("writing safetensors")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    if not any(target.glob("*.safetensors")):
        raise CacheError("transformers wrote no safetensors file")
