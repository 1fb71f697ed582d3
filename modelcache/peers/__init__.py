"""Other nodes: pieces are given and taken before the source is asked.

``group`` knows the peers, ``client`` asks one, ``server`` answers, ``wire`` is their protocol
(pure), ``piece_inventory`` what this node can give. ``replicate`` has other sites preload a model.
"""
