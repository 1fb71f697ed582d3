"""The simulated engine's HTTP API, a module for each family of endpoints.

``completions``, ``responses``, ``messages`` and ``pooling`` are endpoints; ``bodies`` and
``answers`` are what they share.
"""
