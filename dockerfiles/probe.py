"""Ask a service in this container whether it is ready; exit status 0 if it is.

    python probe.py PORT

It takes the standard library only, and no key: /readyz has none.
"""

import sys
import urllib.request

TIMEOUT_S = 4.0


def main(port: str) -> int:
    """Print the answer of /readyz, which `docker inspect` keeps."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=TIMEOUT_S) as reply:
            print(reply.read().decode())
    except OSError as error:  # urllib's errors are OSErrors
        print(f"not ready: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
