"""The model cache of a node: weights come once from a store, and are near when an engine starts.

``cache`` is the face of it; ``serving`` is what a node does for others. ``sources`` are stores,
``fetch`` downloads, ``bandwidth`` shares what downloads may use, ``store`` is the disk,
``pagecache`` the memory, ``peers`` are other nodes and ``prepare`` makes other formats of a model.
``types``, ``refs`` and ``settings`` are shared, ``safetensors_index`` parses headers, ``ports`` has
the protocols that others implement or use.
"""
