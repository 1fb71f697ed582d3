"""Other formats of a model, made ahead of its use by steps in the engine's environment.

``run`` runs the steps and keeps their results in the cache. ``step_process`` is one step's process,
``built_in_steps`` are those that run in it without a command of the operator's, and the sizes of
their results. ``default_model`` makes the model that works offline.
"""
