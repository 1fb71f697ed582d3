"""The model cache of a node: weights come once from a source, and are near when an engine starts.

``cache`` is the face of it; ``serving`` is what a node does for others. ``sources`` are where
models come from, ``fetch`` downloads, ``bandwidth`` shares what downloads may use, ``store`` is the
disk of this node, ``pagecache`` its memory, ``peers`` are other nodes, and ``prepare`` makes other
formats of a model.
``types``, ``refs`` and ``settings`` are shared, ``safetensors_index`` parses headers, ``ports`` has
the protocols that others implement or use.
"""
