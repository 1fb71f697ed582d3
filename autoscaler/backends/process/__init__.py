"""Engines as child processes of Tidegate.

``backend`` implements the protocol; ``replica`` is one replica's process as the backend holds it,
``family`` all processes of a replica and their record on disk, ``procs`` reads ``/proc``.
``start_gate`` holds an engine until it is recorded, ``fork_server`` forks engines, ``gpus`` lists
this machine's GPUs, ``placement`` finds GPUs, cores and a port, ``logs`` keeps an engine's log.
"""
