"""Steps that make of a model what its pool serves, run once and kept.

``run`` executes steps one after another, ``step_process`` one of them (under ``child_guard``),
``results`` keeps what they made, ``size`` predicts it. ``child`` has the built-in steps, with
``gguf``, ``sharding`` and ``tensor_file``; ``default_model`` makes the model of ``make run``.
"""
