"""The composition root: settings in, a running process out. Nothing is put together elsewhere.

``up``, ``agent`` and ``adapter`` are the verbs of these names. ``workers`` starts and watches the
data path's processes on the sockets of ``listeners``, which also has the record of where a running
Tidegate listens; ``admin_token`` is what its admin listener wants to be shown. ``fleet`` publishes
replicas to the workers and reads demand back. ``cache`` builds this node's model cache, ``engines``
what is run for a replica, ``kubernetes`` what talks to a cluster. ``process`` has logs and signals.
"""
