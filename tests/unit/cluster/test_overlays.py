"""The overlays of cluster/, built by kustomize, against the schemas of what reads them, offline."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raytrain_adv.config import load
from tests.unit.cluster.kuberay import KINDS, schema_of

CLUSTER = Path(__file__).parents[3] / "cluster"
COMPONENTS = sorted(path.parent.name for path in CLUSTER.glob("components/*/kustomization.yaml"))
OVERLAYS = sorted(path.parent.name for path in CLUSTER.glob("overlays/*/kustomization.yaml"))
needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl builds the overlays"
)


def build(folder: Path) -> list[dict[str, Any]]:
    made = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert made.returncode == 0, made.stderr
    return [one for one in yaml.safe_load_all(made.stdout) if one]


def with_component(name: str, tmp_path: Path) -> list[dict[str, Any]]:
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    folder = tmp_path / "cluster" / "overlays" / "tried"
    folder.mkdir()
    lines = {"resources": ["../../kuberay"], "components": [f"../../components/{name}"]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({"namespace": "ml", **lines}))
    return build(folder)


def check(manifests: list[dict[str, Any]]) -> None:
    for one in manifests:
        if (one["apiVersion"], one["kind"]) in KINDS:
            jsonschema.Draft202012Validator(schema_of(one)).validate(one)


def of_kind(kind: str, manifests: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [one for one in manifests if one["kind"] == kind]
    return found


@needs_kubectl
@pytest.mark.parametrize("name", COMPONENTS)
def test_kubernetes_knows_every_field_of_a_component(name, tmp_path):
    check(with_component(name, tmp_path))


@needs_kubectl
@pytest.mark.parametrize("name", OVERLAYS)
def test_kubernetes_knows_every_field_of_an_overlay(name):
    manifests = build(CLUSTER / "overlays" / name)
    check(manifests)
    spaces = {one["metadata"].get("namespace") for one in manifests if one["kind"] != "Namespace"}
    assert len(spaces) == 1 and None not in spaces


@needs_kubectl
def test_the_smoke_test_needs_no_gpu_and_runs_a_job_that_loads(tmp_path):
    manifests = build(CLUSTER / "overlays" / "kind")
    job = of_kind("RayJob", manifests)
    text = yaml.safe_dump(job)
    assert "nvidia" not in text and "rdma" not in text and "NCCL_IB_HCA" not in text
    assert text.count("image: raytrain-adv:2.60.0") == 2
    assert "imagePullPolicy: Never" in text
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["maxReplicas"] == 1
    claim = of_kind("PersistentVolumeClaim", manifests)["spec"]
    assert claim["accessModes"] == ["ReadWriteOnce"] and claim["storageClassName"] == "standard"
    file = tmp_path / "job.yaml"
    file.write_text(of_kind("ConfigMap", manifests)["data"]["job.yaml"])
    loaded = load(str(file), job["spec"]["entrypoint"].split()[4:])
    assert loaded.parallel.use_cpu and loaded.ray.ray_num_workers == 1


@needs_kubectl
def test_workers_may_be_smaller_than_a_node(tmp_path):
    for one in with_component("one-gpu-workers", tmp_path):
        spec = one["spec"].get("rayClusterSpec", one["spec"])
        for group in spec.get("workerGroupSpecs", ()):
            (container,) = group["template"]["spec"]["containers"]
            assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


@needs_kubectl
def test_a_private_registry_s_secret_reaches_every_pod(tmp_path):
    for one in with_component("pull-secret", tmp_path):
        spec = one["spec"].get("rayClusterSpec", one["spec"])
        groups = (
            [spec["headGroupSpec"], *spec["workerGroupSpecs"]] if "headGroupSpec" in spec else []
        )
        for group in groups:
            assert group["template"]["spec"]["imagePullSecrets"] == [
                {"name": "raytrain-adv-registry"}
            ]


@needs_kubectl
def test_kueue_gets_a_job_of_a_fixed_size_that_waits_in_its_queue(tmp_path):
    manifests = with_component("kueue", tmp_path)
    job, queue = of_kind("RayJob", manifests), of_kind("LocalQueue", manifests)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    assert queue["spec"]["clusterQueue"] == of_kind("ClusterQueue", manifests)["metadata"]["name"]
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert job["spec"]["suspend"] is True and "enableInTreeAutoscaling" not in cluster
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    (covered,) = of_kind("ClusterQueue", manifests)["spec"]["resourceGroups"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert set(limits) <= set(covered["coveredResources"])


@needs_kubectl
def test_the_head_s_state_outlives_its_pod_in_redis(tmp_path):
    manifests = with_component("gcs-fault-tolerance", tmp_path)
    cluster, service = of_kind("RayCluster", manifests), of_kind("Service", manifests)
    options = cluster["spec"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:6379"
    deployment = of_kind("Deployment", manifests)["spec"]
    assert service["spec"]["selector"] == deployment["template"]["metadata"]["labels"]
    (container,) = deployment["template"]["spec"]["containers"]
    assert container["env"][0]["valueFrom"] == options["redisPassword"]["valueFrom"]


@needs_kubectl
def test_only_ray_the_operator_and_prometheus_reach_ray_s_pods(tmp_path):
    policy = of_kind("NetworkPolicy", with_component("network-policy", tmp_path))["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    assert all(rule.get("from") for rule in policy["ingress"])
    assert [rule.get("ports", [{}])[0].get("port") for rule in policy["ingress"]] == [
        None,
        8265,
        8080,
    ]
