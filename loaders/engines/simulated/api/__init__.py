"""The simulated engine's HTTP API, a module for each family of endpoints.

``chat``, ``completions``, ``responses``, ``messages``, ``pooling`` and ``tokenizing`` are
endpoints; ``bodies``, ``context``, ``answers``, ``errors`` and ``events`` are what they share.
"""
