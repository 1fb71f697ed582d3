"""The data path: one request's life, in worker processes that know nothing of the control side.

``worker`` is the process (``messages`` is what control tells it, ``shared`` the memory both map).
``client`` and ``connection`` are a client's side, ``exchange`` and ``answer`` one request,
``pool`` holds and places it, ``upstream`` are the connections to replicas, ``local`` answers
without an engine. ``protocol`` is the wire format, ``metrics`` and ``tls`` what they say,
``compiled`` builds the fast form.
"""
