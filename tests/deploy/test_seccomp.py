"""The seccomp profile of the tool container is what its generator makes, and stays narrow."""

import importlib.util
import json
from pathlib import Path

DOCKERFILES = Path(__file__).parents[2] / "dockerfiles"
PROFILE = json.loads((DOCKERFILES / "seccomp-tool.json").read_text())


def load_generator():
    specification = importlib.util.spec_from_file_location("seccomp", DOCKERFILES / "seccomp.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_file_is_what_the_generator_makes() -> None:
    assert load_generator().profile() == PROFILE


def test_each_call_that_level_full_adds_has_its_own_reason() -> None:
    generator = load_generator()
    rules = {rule["names"][0]: rule for rule in PROFILE["syscalls"] if len(rule["names"]) == 1}
    for name in generator.FULL:
        assert rules[name]["action"] == "SCMP_ACT_ALLOW"
        assert rules[name]["comment"].startswith("level full: ")
    assert len({rules[name]["comment"] for name in generator.FULL}) == len(generator.FULL)


def test_what_is_dangerous_is_allowed_by_no_rule() -> None:
    allowed = {
        n for r in PROFILE["syscalls"] if r["action"] == "SCMP_ACT_ALLOW" for n in r["names"]
    }
    refused = {n for names in load_generator().REFUSED.values() for n in names.split()}
    assert PROFILE["defaultAction"] == "SCMP_ACT_ERRNO"
    assert not allowed & refused
    for name in ("bpf", "keyctl", "ptrace", "io_uring_setup", "kexec_load", "userfaultfd"):
        assert name not in allowed
