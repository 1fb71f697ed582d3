"""Engines forked from a process that has imported vLLM already.

``server`` runs under the engine's Python, imports and forks; ``child`` is what a forked process
does to become an engine, ``patches`` what it changes in vLLM on the way; ``client`` is the side of
the control process. What they tell each other is in ``wire``.
"""
