"""The gateway: everything a client, an operator or a shell talks to.

``datapath`` carries requests, ``picker`` chooses replicas for those that an Envoy carries, and
``compiled`` is the fast form of both. ``admin`` is the operators' HTTP listener, ``settings`` reads
what was configured, ``cli`` is the ``tidegate`` command, ``doctor`` looks at the machine, and
``compose`` puts a running process together from all packages. ``terminal`` is what all of them say
on one, ``charts`` what they draw.
"""

import os
import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[0] == os.getcwd():
    # ``python -m`` looks in the working directory first: whatever lies there would be imported in
    # place of modules of the same names. It comes last, and only where this package is from there.
    here = sys.path.pop(0)
    sys.path += [here] if __file__.startswith(f"{here}/gateway/") else []
