"""Which replica gets a request: pure functions of what is known.

``types`` is the published fleet, ``endpoint`` a replica as one worker routes to it, ``request``
what is known of a request. ``pick`` decides: ``filters`` say which endpoints may take it,
``scorers`` what it would cost at each. ``ledger`` counts what is in flight, ``tokens`` estimates
costs, ``failures`` what failed answers cost a replica, ``settings`` is the section of that name.
"""
