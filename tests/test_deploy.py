"""The files of jobs/deploy are what their readers take: cron, Ray, Kubernetes, KubeRay, and hubmill itself."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer.main
import yaml
from cronsim import CronSim
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from converter import cli
from converter.errors import UnsupportedError
from jobs.cluster import check_nodes
from jobs.convert import pick_device
from jobs.prepare import _cores as cores_of
from small_run import ROOT

DEPLOY = ROOT / "jobs" / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
VERSIONS = ("1.31", kubernetes_validate.latest_version())  # podFailurePolicy and timeZone are settled since 1.31
# A folder with KubeRay's CustomResourceDefinitions, of `kubectl get crd rayjobs.ray.io -o yaml` or from its sources.
CRDS = os.environ.get("HUBMILL_KUBERAY_CRDS", "")


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def job_of_ray() -> dict[str, Any]:
    return documents(DEPLOY / "kubernetes" / "rayjob.yaml")[0]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod that the files make, by the name of its file and kind."""
    for path in KUBERNETES:
        for document in documents(path):
            if document["kind"] == "CronJob":
                yield path.name, document["spec"]["jobTemplate"]["spec"]["template"]["spec"]
            elif document["kind"] == "RayJob":
                cluster = document["spec"]["rayClusterSpec"]
                for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                    yield path.name, group["template"]["spec"]


def cron_line() -> tuple[str, str]:
    """The schedule and the command of the crontab's one line."""
    lines = [line for line in (DEPLOY / "crontab").read_text("utf-8").splitlines() if line and line[0] != "#"]
    assert len(lines) == 1
    parts = lines[0].split(None, 5)
    return " ".join(parts[:5]), parts[5]


def schedules() -> list[str]:
    kinds = [document for path in KUBERNETES for document in documents(path) if document["kind"] == "CronJob"]
    return [cron_line()[0], *(job["spec"]["schedule"] for job in kinds)]


def hubmill_commands() -> list[list[str]]:
    """The arguments of every `hubmill convert` in the files."""
    found = [shlex.split(job_of_ray()["spec"]["entrypoint"])]
    found += [box["command"] for _, pod in pods() for box in pod["containers"] if "command" in box]
    made = subprocess.run(
        [
            "sh",
            "-c",
            cron_line()[1].replace("/srv/hubmill", str(ROOT)).replace("make ", "make --dry-run ").split(">>")[0],
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    found += [shlex.split(line) for line in made.stdout.splitlines() if line.startswith(".venv/bin/hubmill convert")]
    return found


@pytest.mark.parametrize("schedule", schedules())
def test_schedules_mean_every_night_at_two(schedule: str) -> None:
    times = CronSim(schedule, datetime(2026, 12, 30, 3))
    assert [next(times).isoformat() for _ in range(2)] == ["2026-12-31T02:00:00", "2027-01-01T02:00:00"]


def test_the_crontab_line_survives_cron() -> None:
    _, command = cron_line()
    assert "%" not in command  # cron makes a line end of it
    subprocess.run(["sh", "-n", "-c", command], check=True)


def test_every_command_is_one_that_hubmill_takes() -> None:
    commands = hubmill_commands()
    assert len(commands) == 3
    convert = typer.main.get_command(cli.app).commands["convert"]  # type: ignore[attr-defined]
    for words in commands:
        assert Path(words[0]).name == "hubmill" and words[1] == "convert"
        convert.make_context("convert", list(words[2:]))  # raises for an option that is not there


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_object(path: Path, version: str) -> None:
    for document in documents(path):
        if document["apiVersion"] != "ray.io/v1":
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_pod(version: str) -> None:
    for name, spec in pods():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec}
        kubernetes_validate.validate(pod, version, strict=True)
        wrong = copy.deepcopy(pod)
        wrong["spec"]["containers"][0]["volumeMount"] = []
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, version, strict=True)
        mounts = {mount["name"] for box in spec["containers"] for mount in box["volumeMounts"]}
        assert mounts == {volume["name"] for volume in spec["volumes"]}, name


def test_tokens_come_from_a_secret_and_nobody_is_root() -> None:
    tokens = [item for _, pod in pods() for box in pod["containers"] for item in box.get("env", ())]
    assert len(tokens) == 3
    for item in tokens:
        assert item["name"] == "HF_TOKEN" and item["valueFrom"]["secretKeyRef"]["name"] == "hubmill-hub"
    for _, pod in pods():
        assert pod["securityContext"]["runAsNonRoot"]
        assert not any(box["securityContext"]["allowPrivilegeEscalation"] for box in pod["containers"])


def test_ray_reads_the_cluster_of_the_ray_job() -> None:
    spec = job_of_ray()["spec"]["rayClusterSpec"]
    cluster = {"metadata": {"name": "hubmill", "namespace": "default"}, "spec": spec}
    nodes = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert nodes["headgroup"]["resources"]["CPU"] == 0
    workers = nodes["workers"]
    assert workers["resources"]["CPU"] == 8 and workers["resources"]["memory"] == 32 << 30
    assert workers["min_workers"] == workers["max_workers"] == spec["workerGroupSpecs"][0]["replicas"]
    pins = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert pins and spec["rayVersion"] == pins[1]


def closed(schema: Any) -> Any:
    """The schema, refusing keys that it does not name, as `kubectl create` does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in found:
        found.setdefault("additionalProperties", False)
    return found


@pytest.mark.skipif(not CRDS, reason="HUBMILL_KUBERAY_CRDS names no folder with KubeRay's definitions")
def test_kuberay_takes_the_ray_job() -> None:
    definitions = [document for path in Path(CRDS).glob("*rayjobs*.yaml") for document in documents(path)]
    schema = next(
        version["schema"]["openAPIV3Schema"]
        for definition in definitions
        for version in definition["spec"]["versions"]
        if version["name"] == "v1"
    )
    schema = closed(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft4Validator(schema).validate(job_of_ray())
    wrong = job_of_ray()
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 2
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft4Validator(schema).validate(wrong)


def test_ray_up_takes_its_file() -> None:
    config = documents(DEPLOY / "ray-cluster.yaml")[0]
    ready = prepare_config(copy.deepcopy(config))
    validate_config(ready)
    assert ready["max_workers"] == len(config["provider"]["worker_ips"])
    with pytest.raises(jsonschema.ValidationError):
        validate_config(ready | {"worker_start_ray_command": []})
    for command in (*ready["head_start_ray_commands"], *ready["worker_start_ray_commands"]):
        subprocess.run(["sh", "-n", "-c", command], check=True)


def test_the_image_is_made_of_what_is_there() -> None:
    lines = (DEPLOY / "Dockerfile").read_text("utf-8").splitlines()
    for line in lines:
        if line.startswith("COPY "):
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), line


@pytest.mark.parametrize(("limit", "cores"), [("max 100000\n", 64), ("800000 100000\n", 8), ("50000 100000\n", 1)])
def test_a_container_plans_with_its_share_of_the_cores(
    limit: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    (tmp_path / "cpu.max").write_text(limit)
    assert cores_of(tmp_path / "cpu.max") == cores
    assert cores_of(tmp_path / "nothing") == 64


def test_gpus_of_a_cluster_are_not_looked_for_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pick_device("cuda", "head:6379") == "cuda"
    assert pick_device("auto", "head:6379") == "cpu"
    with pytest.raises(UnsupportedError, match="torch sees no GPU"):
        pick_device("cuda")


def test_a_cluster_of_nothing_but_its_head_is_refused() -> None:
    """Ray would wait for a node with cores for ever, and in silence."""
    with pytest.raises(UnsupportedError, match=r"no node has cores.*Start the workers first"):
        check_nodes([], [])
