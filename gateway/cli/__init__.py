"""The ``tidegate`` command.

``main`` looks whether the packages are Tidegate's own, runs a verb, and turns what ends it into a
line and an exit code. ``verbs`` has the verbs, ``model`` those of ``tidegate model``, ``history``
and ``history_import`` those of ``tidegate history``, and ``history_files`` the files they read and
write; ``cluster`` has those of ``tidegate deploy`` and ``tidegate import``; ``explain``,
``forecast``, ``replay`` and ``adapter`` are the verbs of these names. ``base`` has the common
options and effects, ``client`` asks the admin API, ``tables`` prints.
"""
