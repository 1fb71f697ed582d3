"""What the autoscaler sees.

``window`` demand as means over the stable and panic windows, ``series`` a pool's counters minute by
minute, ``rates`` a counter's growth on a grid, ``history`` the past of all pools in a file,
``decisions`` those of the past in it, ``hindsight`` what they cost, ``recorder`` what keeps both,
``backfill`` the past from elsewhere, ``gaps`` the times without requests, ``activity`` which pools
have one now. ``engine_scraper`` what each replica's engine says of its load, ``gpus`` what GPUs do.
"""
