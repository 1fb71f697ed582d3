"""``python -m loaders.engines.simulated``: one simulated engine as its own process."""

from __future__ import annotations

import sys

from loaders.engines.simulated.arguments import settings_from
from loaders.engines.simulated.server import run

if __name__ == "__main__":
    sys.exit(run(settings_from(sys.argv[1:])))
