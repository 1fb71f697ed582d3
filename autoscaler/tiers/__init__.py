"""How warm a pool at zero is kept.

``manager`` moves a pool between tiers, through the protocol in ``preparer``, which implements it
with the model cache, the page cache and forked engines. ``idle_planner`` says for how
long it is kept in each, by what that costs. ``leases`` hold what must not be evicted;
``wake_times`` remembers how long wakes took.
"""
