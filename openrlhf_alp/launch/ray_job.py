"""Runs a command as a job of a running Ray cluster, through Ray's own job API.

    python -m openrlhf_alp.launch.ray_job --address http://head:8265 --entry "python -m ..."

The job's log becomes this process's output and its end this process's exit status, so that a
launcher treats it like a process of its own. SIGTERM stops the job. The services' keys travel in
the job's environment, which whoever reaches the cluster's dashboard can read.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from types import FrameType

from ray.job_submission import JobStatus, JobSubmissionClient

from services.common.wire import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, TOOL_KEY_VARIABLE

_READY_S = 300.0
_CARRIED = (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE, TOOL_KEY_VARIABLE, "PYTHONUNBUFFERED")
"""Variables of this process that the job gets."""


def main() -> int:
    """Submits, follows, and returns 0 when the job succeeded, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", required=True, help="the cluster's dashboard")
    parser.add_argument("--entry", required=True, help="command line of the job")
    arguments = parser.parse_args()
    client = JobSubmissionClient(arguments.address)
    variables = {name: os.environ[name] for name in _CARRIED if name in os.environ}
    job = _submit(client, arguments.entry, variables)
    print(f"job {job} on {arguments.address}", flush=True)

    def stop(signum: int, frame: FrameType | None) -> None:
        client.stop_job(job)
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    asyncio.run(_follow(client, job))
    status = client.get_job_status(job)
    print(f"job {job}: {status}: {client.get_job_info(job).message}", flush=True)
    return 0 if status == JobStatus.SUCCEEDED else 1


def _submit(client: JobSubmissionClient, entry: str, variables: dict[str, str]) -> str:
    """The id of the job; a cluster that has just been started takes jobs after some seconds."""
    give_up_s = time.monotonic() + _READY_S
    while True:
        try:
            return str(client.submit_job(entrypoint=entry, runtime_env={"env_vars": variables}))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > give_up_s:
                raise
            time.sleep(1.0)


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
