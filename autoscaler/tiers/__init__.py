"""How warm a pool at zero is kept.

``manager`` moves a pool between tiers, through the protocol in ``preparer``, which implements it
with the model cache, the page cache and forked engines. ``leases`` hold what must not be evicted;
``wake_times`` remembers how long wakes took.
"""
