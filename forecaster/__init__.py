"""What demand will be: quantiles per step, and of the maximum over a lead window.

``types`` what goes in and comes out · ``cron`` recurring windows, in a time zone (needs no numpy).
"""
