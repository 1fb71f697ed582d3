"""Settings: one typed tree, read once from defaults, file, environment and flags.

``schema`` is the tree, ``load`` merges the layers and remembers where each value came from,
``toml`` finds a key's line in the file, ``errors`` words what is wrong, ``fields`` is the tree as
data, ``docs`` prints the example file, ``defaults`` is what ``tidegate up`` serves when nothing is
configured. ``changes`` compares two trees for a reload.
"""
