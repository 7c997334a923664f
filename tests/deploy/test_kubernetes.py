"""The Kubernetes manifests: strictly what the official schemas allow, and in step with the image."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.harness import ROOT
from blip.server.metrics import Metrics
from blip.server.probes import STATUSES

MANIFESTS = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.30", "1.37")  # the oldest that is meant to work, and the newest that the validator knows


def validate(path: Path, version: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "-k", version, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def load(name: str, kind: str) -> dict[str, Any]:
    """The one document of this kind in deploy/kubernetes/NAME.yaml."""
    documents = yaml.safe_load_all((MANIFESTS / f"{name}.yaml").read_text())
    (found,) = [document for document in documents if document["kind"] == kind]
    return dict(found)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["service", "gpu", "cpu"])
def test_manifests_are_valid_and_have_no_unknown_field(name: str, version: str) -> None:
    ended = validate(MANIFESTS / f"{name}.yaml", version)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "passed" in ended.stdout + ended.stderr


def test_the_validation_refuses_an_unknown_field(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((MANIFESTS / "gpu.yaml").read_text().replace("failureThreshold", "failureTreshold"))
    assert validate(wrong, VERSIONS[-1]).returncode != 0


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_service_budget_and_autoscaler_are_about_this_deployment(name: str) -> None:
    deployment = load(name, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    service = load("service", "Service")["spec"]
    assert service["selector"] == labels
    assert service["ipFamilyPolicy"] == "PreferDualStack"
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert {port["targetPort"] for port in service["ports"]} <= {port["name"] for port in container["ports"]}
    assert load("service", "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    target = load(name, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"], "the autoscaler sets them"


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_a_pod_has_time_to_leave_the_service_and_to_finish_its_work(name: str) -> None:
    pod = load(name, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    leaving = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= leaving + int(environment["BLIP_GRACE_SECONDS"]) + 10


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_the_pod_is_in_step_with_the_image(name: str) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    pod = load(name, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    security = pod["securityContext"]
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}\n" in dockerfile
    assert f"EXPOSE {container['ports'][0]['containerPort']}\n" in dockerfile
    assert container["securityContext"]["readOnlyRootFilesystem"]
    questions = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    paths = {"startup": "/startupz", "liveness": "/livez", "readiness": "/readyz"}
    assert questions == {kind: {"path": path, "port": "http"} for kind, path in paths.items()}
    assert container["ports"][0]["name"] == "http"
    assert set(paths.values()) == set(STATUSES)


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_every_pod_is_scraped_and_the_queue_scales_the_deployment(name: str) -> None:
    deployment = load(name, "Deployment")
    pod = deployment["spec"]["template"]
    monitor = load("monitoring", "PodMonitor")["spec"]
    assert monitor["selector"]["matchLabels"] == pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in container["ports"]}
    scaled = load("autoscaling", "ScaledObject")["spec"]
    by_cpu = load(name, "HorizontalPodAutoscaler")["spec"]
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (by_cpu["minReplicas"], by_cpu["maxReplicas"])
    assert scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == by_cpu["behavior"]


def test_the_autoscaler_asks_for_metrics_that_there_are() -> None:
    served = Metrics([], dict).document().decode()
    for trigger in load("autoscaling", "ScaledObject")["spec"]["triggers"]:
        names = re.findall(r"blip_\w+", trigger["metadata"]["query"])
        assert names
        assert [name for name in names if f"\n{name}{{" not in served] == []
        reasons = re.findall(r'reason="(.*?)"', trigger["metadata"]["query"])
        assert [reason for reason in reasons if f'reason="{reason}"' not in served] == []
