"""Other formats of a model, made ahead of its use by steps in the engine's environment.

``run`` runs the steps and keeps their results in the cache, with room made by ``size``.
``step_process`` is one step's process, ``child`` the built-in steps in it. ``default_model`` makes
the model that works offline.
"""
