"""Serving engines: ``base`` is the protocol, ``vllm``, ``simulated`` and ``openai_compatible``
implement it, ``client`` is the HTTP by which they are asked.
"""
