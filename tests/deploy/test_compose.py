"""What compose.yaml says of files, keys, networks and versions holds for the rest of the tree."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from openrlhf_alp.data.smollm2 import _FOLDER_NAME
from services.common.wire import FILE_SUFFIX
from services.rollout.settings import RolloutSettings
from services.tool.settings import ToolSettings

REPOSITORY = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
VERSION = re.search(r'version="([^"]+)"', (REPOSITORY / "setup.py").read_text())[1]


def of_profile(profile: str) -> set[str]:
    return {name for name, service in SERVICES.items() if profile in service["profiles"]}


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not service["user"].startswith("0") and "privileged" not in service


def test_the_version_is_that_of_the_package() -> None:
    text = (REPOSITORY / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{VERSION:-([^}]+)\}", text)) == {VERSION}
    assert f"\n## {VERSION} " in (REPOSITORY / "CHANGELOG.md").read_text()


def test_the_tool_service_reaches_nothing_but_its_callers() -> None:
    assert SERVICES["tool"]["networks"] == ["tools"]
    assert COMPOSE["networks"]["tools"]["internal"] and COMPOSE["networks"]["policy"]["internal"]
    on_policy = {n for n, s in SERVICES.items() if "policy" in s.get("networks", ())}
    with_keys = {n for n, s in SERVICES.items() if "rollout_admin_key" in s.get("secrets", ())}
    # Prometheus reads /metrics; without a key the control routes refuse it.
    assert on_policy - with_keys == {"prometheus"}


def test_every_environment_variable_of_a_service_is_one_of_its_settings() -> None:
    for name, settings in (("rollout", RolloutSettings), ("tool", ToolSettings)):
        prefix = settings.model_config["env_prefix"]
        given = {v for v in SERVICES[name]["environment"] if v.startswith("OPENRLHF_ALP_")}
        fields = {prefix + field.upper() for field in settings.model_fields}
        assert {variable.removesuffix(FILE_SUFFIX) for variable in given} <= fields


def test_key_files_are_where_secrets_are_mounted_and_are_made_by_make_keys(tmp_path) -> None:
    (tmp_path / "deploy").mkdir()
    script = (REPOSITORY / "deploy/keys.sh").read_text()
    (tmp_path / "deploy/keys.sh").write_text(script)
    for expected in ("new", "kept"):
        run = subprocess.run(
            ["sh", "deploy/keys.sh"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert expected in run.stdout
    for name, secret in COMPOSE["secrets"].items():
        file = tmp_path / secret["file"]
        assert file.name == name and re.fullmatch("[0-9a-f]{48}", file.read_text())
        assert oct(file.stat().st_mode & 0o777) == "0o444"
    assert oct((tmp_path / "secrets").stat().st_mode & 0o777) == "0o700"
    assert "secrets/\n" in (REPOSITORY / ".gitignore").read_text()
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if variable.endswith(FILE_SUFFIX) and variable.startswith("OPENRLHF"):
                assert value.removeprefix("/run/secrets/") in service["secrets"]


def test_the_rollout_servers_serve_the_model_that_is_unpacked() -> None:
    model = SERVICES["rollout"]["environment"]["OPENRLHF_ALP_ROLLOUT_MODEL"]
    assert model == f"${{MODEL:-/models/openrlhf_alp/{_FOLDER_NAME}}}"


def test_the_model_is_unpacked_only_where_it_is_missing(tmp_path: Path) -> None:
    service = SERVICES["model"]
    shell, flag, script = service["entrypoint"]
    served = SERVICES["rollout"]["environment"]["OPENRLHF_ALP_ROLLOUT_MODEL"]
    assert service["environment"]["MODEL"] == served and flag == "-c"
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho unpacking\n")
    python.chmod(0o755)
    environment = {"MODEL": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    for expected in ("unpacking\n", ""):
        command = [shell, flag, script.replace("$$", "$")]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert run.stdout == expected
        (tmp_path / "config.json").touch()


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_profile_holds_all_that_it_depends_on(profile: str) -> None:
    names = of_profile(profile)
    for name in names:
        assert set(SERVICES[name].get("depends_on", {})) <= names


def load_discover():
    path = REPOSITORY / "dockerfiles/discover.py"
    specification = importlib.util.spec_from_file_location("discover", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_running_services_are_put_into_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    discover = load_discover()
    monkeypatch.setattr(discover, "urls_of", lambda name, port: [f"http://{name}:{port}"])
    plain = discover.settings_for({"train": {"rollout": {"batch_size": 8}}})
    assert plain == [
        "--set",
        'rollout.urls=["http://rollout:8000"]',
        "--set",
        "train.rollout.weight_transport=http",
    ]
    tools = discover.settings_for({"tool": {}, "train": {"rollout": {"weight_transport": "file"}}})
    assert tools[2:] == ["--set", 'tool.urls=["http://tool:8090"]']


def test_a_service_is_found_under_its_name_and_a_missing_one_is_named() -> None:
    discover = load_discover()
    assert json.dumps(discover.urls_of("localhost", 8000)) == '["http://localhost:8000"]'
    with pytest.raises(SystemExit, match=r"no-such-service\.invalid has no address"):
        discover.urls_of("no-such-service.invalid", 1)


def test_a_container_without_a_recipe_says_so() -> None:
    command = [sys.executable, str(REPOSITORY / "dockerfiles/discover.py")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "name a recipe first" in run.stderr
