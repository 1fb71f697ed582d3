"""Serving engines: ``vllm`` and ``simulated``."""
