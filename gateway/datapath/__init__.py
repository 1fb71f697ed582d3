"""The data path: one request's life, in worker processes that know nothing of the control side.

``worker`` is the process and puts the rest together (``messages`` is what it exchanges with the
control process, ``shared`` the memory both map); ``context`` is what all of it shares. From the
engine's side to the client's: ``upstream`` connections to replicas, ``pool`` dispatches and holds
requests, ``request`` is what a request is whatever carries it, ``answer`` passes an engine's answer
on, ``exchange`` is one request from its head to the end of its answer, ``client`` a client's
connection; ``local`` answers without an engine. ``settings`` is the gateway's section, ``protocol``
the wire format, ``metrics`` the counters.
"""
