"""Safetensors from disk to where they are used.

``load`` is the entry. ``files`` finds and opens files, and their checksums; ``plan`` lays out the
reads, ``pipeline`` runs them with ``readers`` into ``staging_buffers`` and on to a ``device``;
``in_place`` copies what is cached straight to where a consumer has its tensors.
``format_benchmark`` measures how quickly vLLM's load formats read the same files.
"""
