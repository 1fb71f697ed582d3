"""Engines as child processes of Tidegate.

``backend`` implements the protocol; ``child`` is one engine's process, ``family`` all processes of
a replica, ``registry`` their record on disk, ``procs`` reads ``/proc``. ``fork_server`` and
``standby`` fork engines, ``start_gate`` holds one until it is recorded, ``placing`` finds its GPUs
and port, ``logs`` and ``phases`` are its log and what that says, ``sleeping`` its sleep and wake
calls.
"""
