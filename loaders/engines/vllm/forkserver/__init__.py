"""Engines forked from a process that has imported vLLM already.

``server`` runs under the engine's Python, imports and forks; ``patches`` is what a forked process
changes in vLLM on its way to become an engine; ``client`` is the side of the control process. What
they tell each other is in ``wire``.
"""
