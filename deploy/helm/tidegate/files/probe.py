"""Asks the agent's admin listener how it is: exit code 0 where the answer is 200.

    python -I -S probe.py http://127.0.0.1:8001/readyz

Run inside the pod, because the listener is on the pod's loopback, which the kubelet does not reach.
"""

import http.client
import sys
from urllib.parse import urlsplit

TIMEOUT_S = 4
"""Below the probes' own, so that it is this which says what is wrong."""


def main() -> None:
    """Ask, and exit. Not by ``urllib.request``: that would go by way of a proxy, if one is set."""
    url = urlsplit(sys.argv[1])
    connection = http.client.HTTPConnection(url.netloc, timeout=TIMEOUT_S)
    try:
        connection.request("GET", url.path)
        answer = connection.getresponse()
        text = answer.read(1_000).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        sys.exit(f"{url.geturl()}: {error}")
    if answer.status != 200:
        sys.exit(f"{url.geturl()}: {answer.status} {text}")


if __name__ == "__main__":
    main()
