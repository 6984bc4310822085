"""What every image has: an ordinary user, labels, a bill of materials, and no secret."""

import json

from engine import docker, require


def check_image(image: str, *, has: set[str], lacks: frozenset[str] = frozenset()) -> None:
    """Inspect an image.

    Args:
        has: Python packages that its bill of materials must name.
        lacks: those that it must not.
    """
    (inspected,) = json.loads(docker("image", "inspect", image))
    config = inspected["Config"]
    require(config["User"] == "1000:1000", f"{image} runs as {config['User'] or 'root'}")
    labels = {name.rpartition(".")[2] for name in config["Labels"] or ()}
    wanted = {"title", "description", "version", "revision", "licenses"}
    require(wanted <= labels, f"{image} has no labels {wanted - labels}")
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    require("API_KEY" not in history + str(config["Env"]), f"a key is in the history of {image}")
    names = packages(image)
    print(f"docker-test: the bill of materials of {image} names {len(names)} packages")
    require(has <= names, f"{', '.join(has - names)} missing in the bill of materials of {image}")
    require(not names & lacks, f"{image} brings {', '.join(names & lacks)}")


def packages(image: str) -> set[str]:
    """Names of the packages in the bill of materials of an image."""
    read = ["run", "--rm", "--network", "none", "--entrypoint", "cat", image]
    bill = json.loads(docker(*read, "/usr/local/openrlhf-alp/sbom.cdx.json"))
    return {component["name"] for component in bill["components"]}


def check_health(image: str) -> None:
    """A service asks itself whether it is ready."""
    (inspected,) = json.loads(docker("image", "inspect", image))
    require("probe.py" in str(inspected["Config"]["Healthcheck"]), f"{image} has no health check")


def size_of(image: str) -> int:
    """Bytes of an image."""
    return int(docker("image", "inspect", "--format", "{{.Size}}", image))
