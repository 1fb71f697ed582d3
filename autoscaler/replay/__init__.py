"""The past replayed on virtual time: what a policy would have cost, and whom it would have hurt.

``types`` what a policy sees and is · ``traces`` demand from files and stored history · ``engine``
what one simulated replica can do · ``supply`` starting, ready and draining replicas, and zero ·
``fleet`` a pool second by second, as a fluid ·
``requests`` one by one, through the real router · ``run`` a trace through a policy · ``score`` ·
``policies`` ours, our re-implementations of others', bounds.
"""
