"""The model cache of a node: weights come once from a source, and are near when an engine starts.

``cache`` is the face of it; ``serving`` is what a node does for others. ``sources`` are where
models come from, ``fetch`` downloads, ``bandwidth`` shares what downloads may use, ``store`` is the
disk of this node, ``pagecache`` its memory, ``peers`` are other nodes, and ``prepare`` makes other
formats of a model.
``types``, ``refs`` and ``settings`` are shared, ``safetensors_index`` parses headers, ``ports`` has
the protocols that others implement or use.
"""

import os
import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[0] == os.getcwd():
    # ``python -m`` looks in the working directory first: whatever lies there would be imported in
    # place of modules of the same names. It comes last, and only where this package is from there.
    here = sys.path.pop(0)
    sys.path += [here] if __file__.startswith(f"{here}/modelcache/") else []
