"""``python -m gateway.datapath LISTEN_FD SHARED_FD CHANNEL_FD``: a worker process, compiled where
that is available."""

import sys

from gateway.datapath import compiled

if __name__ == "__main__":
    compiled.install()
    from gateway.datapath import worker

    sys.exit(worker.main(sys.argv[1:]))
