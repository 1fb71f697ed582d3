"""``python -m gateway.picker PORT SHARED_FD CHANNEL_FD NUDGE_FD...``: the process of the endpoint
picker, compiled where that is available. See ``gateway.datapath.__main__``, which it is like."""

import signal
import sys

if __name__ == "__main__":
    ours = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    for number in ours:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ours)

    from gateway import compiled

    compiled.install()
    from gateway.picker import server

    sys.exit(server.main(sys.argv[1:]))
