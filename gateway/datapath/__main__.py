"""``python -m gateway.datapath LISTEN_FD SHARED_FD CHANNEL_FD NUDGE_FD...``: a worker process,
compiled where that is available."""

import signal
import sys

if __name__ == "__main__":
    # Signals are the control process's: Ctrl-C and Ctrl-\ reach the whole process group, and a
    # worker that stopped on its own would cut streams that the drain is there to finish. They come
    # blocked, so that none is heeded before this either.
    ours = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    for number in ours:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ours)

    from gateway import compiled

    compiled.install()
    from gateway.datapath import worker

    sys.exit(worker.main(sys.argv[1:]))
