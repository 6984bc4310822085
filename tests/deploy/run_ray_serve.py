"""The tool service on a local Ray Serve with two replicas, until a stop signal: PORT is free."""

import signal
import sys

import ray
from ray import serve

from deploy.ray_serve import Scale, tool


def main(port: int) -> None:
    """Serve, say so, wait, and end what was started."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(tool(Scale(min_replicas=2, max_replicas=2)))
    print("serving", flush=True)
    signal.sigwait({signal.SIGTERM})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    # Blocked before any thread starts, so that the signal waits for `sigwait`.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    main(int(sys.argv[1]))
