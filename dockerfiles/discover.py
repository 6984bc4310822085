"""Run a recipe on the services of the compose network, however many of them there are.

    python discover.py RECIPE [options of `openrlhf-alp launch`]

Docker's name server answers for the service names `rollout` and `tool` with the addresses of all
their containers, and for an address with the name of its container. The names go into the recipe:
they stay the same when a container is started again, the addresses need not.
"""

import json
import os
import socket
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PORTS = {"rollout": 8000, "tool": 8090}


def urls_of(service: str, port: int) -> list[str]:
    """URLs of all containers of a service, in a fixed order.

    Raises:
        SystemExit: the name is unknown: no container of the service runs on this network.
    """
    try:
        answers = socket.getaddrinfo(service, port, socket.AF_INET, socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise SystemExit(
            f"discover: {service} has no address ({error}). Start it on the learner's network."
        ) from error
    addresses = sorted({str(answer[4][0]) for answer in answers})
    return sorted(f"http://{_name_of(address)}:{port}" for address in addresses)


def _name_of(address: str) -> str:
    try:
        # "openrlhf-alp-rollout-1.openrlhf-alp_policy": container and network.
        name = socket.gethostbyaddr(address)[0].partition(".")[0]
        known = socket.gethostbyname(name) == address
    except OSError:
        known = False
    return name if known else address


def settings_for(recipe: Mapping[str, Any]) -> list[str]:
    """Options that put the running services into a recipe.

    Tool services only where the recipe has a table for them: with one, episodes call tools.
    """
    settings = [f"rollout.urls={json.dumps(urls_of('rollout', PORTS['rollout']))}"]
    if "tool" in recipe:
        settings.append(f"tool.urls={json.dumps(urls_of('tool', PORTS['tool']))}")
    # Containers share no folder for weights.
    if "weight_transport" not in recipe.get("train", {}).get("rollout", {}):
        settings.append("train.rollout.weight_transport=http")
    return [option for setting in settings for option in ("--set", setting)]


def main(arguments: Sequence[str]) -> None:
    """Become `openrlhf-alp launch`, so that it gets the stop signals itself."""
    if not arguments:
        raise SystemExit("discover: name a recipe first, such as recipes/demo.toml")
    recipe = tomllib.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    command = ["openrlhf-alp", "launch", *arguments, *settings_for(recipe)]
    print(" ".join(command), flush=True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
