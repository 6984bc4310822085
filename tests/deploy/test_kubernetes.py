"""The Kubernetes objects fit each other, the services' settings and the keys of `make keys`."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.common.wire import FILE_SUFFIX
from services.rollout.settings import RolloutSettings
from services.tool.settings import ToolSettings

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "deploy/kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
OBJECTS: list[dict[str, Any]] = [
    thing
    for name in KUSTOMIZATION["resources"]
    for thing in yaml.safe_load_all((FOLDER / name).read_text())
]
NAME = "app.kubernetes.io/name"


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {thing["metadata"]["name"]: thing for thing in OBJECTS if thing["kind"] == kind}


def pod_templates() -> dict[str, dict[str, Any]]:
    sets = {name: s["spec"]["template"] for name, s in of_kind("StatefulSet").items()}
    clusters = of_kind("RayCluster").items()
    return sets | {name: c["spec"]["headGroupSpec"]["template"] for name, c in clusters}


def test_every_file_of_the_folder_is_a_resource() -> None:
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(KUSTOMIZATION["resources"])


def test_images_have_the_version_of_the_package() -> None:
    version = re.search(r'version="([^"]+)"', (REPOSITORY / "setup.py").read_text())[1]
    tags = {image["name"]: image["newTag"] for image in KUSTOMIZATION["images"]}
    assert {tag.partition("-")[0] for tag in tags.values()} == {version}
    used = {c["image"] for pod in pod_templates().values() for c in pod["spec"]["containers"]}
    assert used == tags.keys()


@pytest.mark.parametrize("name", ["rollout", "tool", "learner"])
def test_a_pod_is_hardened_and_has_no_token_of_the_cluster(name: str) -> None:
    pod = pod_templates()[name]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize(
    ("name", "settings"), [("rollout", RolloutSettings), ("tool", ToolSettings)]
)
def test_a_service_is_configured_by_its_settings_and_finds_its_keys(name: str, settings) -> None:
    pod = pod_templates()[name]["spec"]
    (container,) = pod["containers"]
    prefix = settings.model_config["env_prefix"]
    fields = {prefix + field.upper() for field in settings.model_fields}
    secret = next(v["secret"] for v in pod["volumes"] if v["name"] == "keys")
    paths = {f"/run/secrets/alp/{item['path']}" for item in secret["items"]}
    (made,) = re.findall("for name in (.*); do", (REPOSITORY / "deploy/keys.sh").read_text())
    assert {item["key"] for item in secret["items"]} <= set(made.split())
    values = {e["name"]: e["value"] for e in container["env"] if e["name"].startswith(prefix)}
    assert {variable.removesuffix(FILE_SUFFIX) for variable in values} <= fields
    assert {v for k, v in values.items() if k.endswith(FILE_SUFFIX)} == paths
    for probe, path in (("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
        assert container[probe]["httpGet"]["path"] == path


def test_each_selector_finds_the_pods_of_its_name() -> None:
    labels = {name: t["metadata"]["labels"][NAME] for name, t in pod_templates().items()}
    for kind, find in (
        ("Service", lambda s: s["selector"][NAME]),
        ("PodDisruptionBudget", lambda s: s["selector"]["matchLabels"][NAME]),
        ("ServiceMonitor", lambda s: s["selector"]["matchLabels"][NAME]),
    ):
        things = of_kind(kind)
        assert things.keys() == {"rollout", "tool"}
        for name, thing in things.items():
            assert find(thing["spec"]) == labels[name]


def test_nothing_connects_unless_a_policy_says_so() -> None:
    policies = of_kind("NetworkPolicy")
    assert policies["default-deny"]["spec"] == {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
    }
    for name in ("rollout", "tool"):
        spec = policies[name]["spec"]
        assert "Egress" in spec["policyTypes"] and "egress" not in spec
        callers = [
            f["podSelector"]["matchLabels"][NAME] for r in spec["ingress"] for f in r["from"]
        ]
        assert callers == ["learner", "prometheus"]


def test_the_component_for_level_full_changes_what_it_means_to() -> None:
    component = yaml.safe_load((FOLDER / "seccomp/kustomization.yaml").read_text())
    (patch,) = component["patches"]
    steps = {step["path"]: step for step in yaml.safe_load(patch["patch"])}
    pod = of_kind("StatefulSet")[patch["target"]["name"]]["spec"]["template"]["spec"]
    assert pod["containers"][0]["env"][1]["name"] == "OPENRLHF_ALP_TOOL_MIN_ISOLATION"
    assert steps["/spec/template/spec/containers/0/env/1/value"]["value"] == "full"
    assert "runtimeClassName" in pod and pod["securityContext"]["seccompProfile"]
    profile = steps["/spec/template/spec/securityContext/seccompProfile"]["value"]
    assert (REPOSITORY / "dockerfiles" / profile["localhostProfile"]).is_file()
