"""The composition root: settings in, a running process out. Nothing is put together elsewhere.

``up`` is ``tidegate up`` and ``agent`` is ``tidegate agent``. ``workers`` starts and watches the
data path's processes on the sockets of ``listeners``, ``fleet`` publishes replicas to them and
reads demand back. ``cache``, ``preparation``, ``tiers`` and ``engines`` build the parts that start
engines. ``process`` has logs and signals, ``run_record`` where a running Tidegate listens.
"""
