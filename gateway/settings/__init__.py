"""Settings: one typed tree, read once from defaults, file, environment and flags.

``schema`` is the tree, ``load`` merges the layers and remembers where each value came from, ``env``
and ``toml`` read two of the layers, ``errors`` words what is wrong, ``fields`` is the tree as data,
``docs`` prints the example file, ``defaults`` is what ``tidegate up`` serves when nothing is
configured, ``hub_names`` has hub models fetched through the model cache. ``changes`` compares two
trees for a reload.
"""
