"""cluster/ against the schemas of what reads it, offline."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from raytrain_adv.config import load
from tests.unit.cluster.kuberay import schema_of

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "cluster"
OTHERWISE = {"python-dateutil"}
"""Versions in which the image differs from the tested set; cluster/pin.py says why."""
MANIFESTS = [
    path
    for path in sorted((CLUSTER / "kuberay").glob("*.yaml"))
    if path.name != "kustomization.yaml"
]


def read(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load(path.read_text())
    return manifest


def cluster_specs() -> list[dict[str, Any]]:
    job = read(CLUSTER / "kuberay" / "rayjob.yaml")["spec"]["rayClusterSpec"]
    return [read(CLUSTER / "kuberay" / "raycluster.yaml")["spec"], job]


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def aws() -> dict[str, Any]:
    return read(CLUSTER / "aws.yaml")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_knows_every_field(path):
    manifest = read(path)
    jsonschema.Draft202012Validator(schema_of(manifest)).validate(manifest)


def worker(job: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    return group


BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a misspelt field of the job": lambda job: job["spec"].update(entryPoint="x"),
    "a misspelt field of a group": lambda job: worker(job).update(maxReplica=3),
    "a mode that does not exist": lambda job: job["spec"]["rayClusterSpec"].update(
        authOptions={"mode": "tok"}
    ),
    "a number where KubeRay takes text": lambda job: worker(job).update(
        rayStartParams={"num-gpus": 8}
    ),
    "a quantity that is none": lambda job: worker(job)["template"]["spec"]["containers"][0][
        "resources"
    ]["limits"].update(memory="512 GB"),
    "a mount that is none": lambda job: worker(job)["template"]["spec"]["containers"][0][
        "volumeMounts"
    ].append({"name": "shm", "path": "/dev/shm"}),
    "no bound for the autoscaler": lambda job: worker(job).pop("maxReplicas"),
}


@pytest.mark.parametrize("change", BREAKS.values(), ids=BREAKS.keys())
def test_the_check_refuses(change):
    job = copy.deepcopy(read(CLUSTER / "kuberay" / "rayjob.yaml"))
    change(job)
    assert list(jsonschema.Draft202012Validator(schema_of(job)).iter_errors(job))


def test_cluster_and_job_describe_the_same_cluster():
    alone, of_job = cluster_specs()
    head = of_job["headGroupSpec"]["template"]["spec"]
    head["volumes"] = [v for v in head["volumes"] if v["name"] != "job"]
    mounts = head["containers"][0]["volumeMounts"]
    head["containers"][0]["volumeMounts"] = [m for m in mounts if m["name"] != "job"]
    assert of_job == alone


@pytest.mark.parametrize("spec", cluster_specs(), ids=["raycluster", "rayjob"])
def test_what_a_ray_pod_needs_is_there(spec):
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token"}
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]
    for pod in pods(spec):
        (container,) = pod["containers"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounted) == volumes
        assert mounted["shm"] == "/dev/shm"
        secrets = [e for e in container["env"] if re.search("TOKEN|KEY|PASSWORD", e["name"])]
        assert all("secretKeyRef" in one["valueFrom"] for one in secrets)
    gpus = pods(spec)[1]
    limits = gpus["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 8 and gpus["nodeSelector"]
    drain = {e["name"]: e.get("value") for e in gpus["containers"][0]["env"]}
    assert (
        int(drain["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < gpus["terminationGracePeriodSeconds"]
    )


def test_the_job_s_entrypoint_is_a_command_of_this_package(job_file):
    module, path, *overrides = read(CLUSTER / "kuberay" / "rayjob.yaml")["spec"][
        "entrypoint"
    ].split()[2:]
    assert module == "raytrain_adv.launch" and path == "/etc/raytrain_adv/job.yaml"
    job = load(str(job_file()), overrides)
    assert job.output.resume_from_checkpoint is True
    assert job.output.output_dir.startswith("/mnt/shared/")


def test_ray_up_knows_every_field():
    """Ray's own schema, and its own check of the file with its defaults filled in."""
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(aws(), schema)
    validate_config(prepare_config(aws()))
    for misspelt in ({**aws(), "max_worker": 2}, {**aws(), "docker": {"img": "x"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(misspelt, schema)


def test_ray_up_asks_for_the_token_and_stays_within_the_node():
    cluster = aws()
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in " ".join(cluster["head_start_ray_commands"])
    assert cluster["available_node_types"]["h100"]["max_workers"] <= cluster["max_workers"]


def pinned() -> dict[str, str]:
    lines = (CLUSTER / "requirements.txt").read_text().splitlines()
    wanted = re.compile(r"([a-z0-9][a-z0-9._-]*)==(\S+) --hash=sha256:[0-9a-f]{64}")
    found = [wanted.fullmatch(line) for line in lines if line and not line.startswith("#")]
    assert all(found)
    return {normal(one[1]): one[2] for one in found if one is not None}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_image_installs_the_tested_versions_by_hash():
    image = pinned()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    differ = {
        name: (version, image[normal(name)])
        for name, version in tested.items()
        if image.get(normal(name), version) != version and name not in OTHERWISE
    }
    assert not differ
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["advanced"]]
    names = [normal(re.split(r"[\[<>=; ]", need)[0]) for need in needs]
    assert [name for name in names if name not in image] == []


def test_the_image_s_parts_exist_and_are_sent_to_the_builder():
    copied = re.findall(r"^COPY (.+) \S+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    sent = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    assert sorted(sources) == sorted(sent)
    assert all((ROOT / source).exists() for source in sources)
