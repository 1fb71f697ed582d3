"""How warm a pool at zero is kept.

``manager`` moves pools between tiers, through the protocol in ``preparer``. ``warmth`` implements
that with model cache, page cache and forked engines (``warmth_parts`` are the protocols it needs
of them, ``warmth_places`` its bookkeeping). ``wake_times`` measures.
"""
