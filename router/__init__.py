"""Which replica gets a request: pure functions of what is known.

``types`` and ``view`` are what a pick sees, ``filters``, ``scorers`` and ``pick`` make it,
``ledger`` counts what is in flight, ``tokens`` estimates costs, ``settings`` is the section of
that name.
"""
