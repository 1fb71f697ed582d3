"""The past of a pool from elsewhere, as minutes for its history.

``prometheus`` range queries of a Prometheus server, ``queries`` which queries a pool's series are.
"""
