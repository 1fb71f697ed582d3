"""The ``tidegate`` command.

``main`` runs a verb and turns what ends it into a line and an exit code; before that
``import_check`` looks whether the packages are Tidegate's own. ``verbs`` has up, agent, status,
scale, reload, explain and doctor; ``config`` and ``model`` the groups of those names. ``base`` has
the common options and effects, ``client`` asks the admin API. ``tables``, ``model_tables`` and
``progress`` print.
"""
