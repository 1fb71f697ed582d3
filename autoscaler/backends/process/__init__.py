"""Engines as processes on this machine.

``backend`` implements the protocol; ``replica`` is one replica's process as the backend holds it,
``family`` all processes of a replica and their record on disk, ``procs`` reads ``/proc``.
``guard`` is the parent of an engine, ``fork_server`` forks engines. ``placement`` finds GPUs, cores
and a port, ``logs`` are the engines' logs.
"""
