"""The manifests fit the published schemas and have what we rely on; a pod ends with a code for Kubernetes to act on."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow.training import models
from kubeflow_trainer_api import models as trainer_models
from kubernetes_validate.utils import ValidationError, latest_version, validate

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "kubernetes"
VERSIONS = ["1.31", latest_version()]
"""Of Kubernetes: the oldest that indexed-job.yaml is for, and the newest whose schema is published."""


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def check_kubeflow(value: Any, kind: str) -> None:
    """Hold a value against a type of the Kubeflow training operator's API, as its own client declares it."""
    if match := re.fullmatch(r"(?:list\[|dict\(str, )(.*)[])]", kind):
        for each in value.values() if isinstance(value, dict) else value:
            check_kubeflow(each, match[1])
    elif kind in ("V1ObjectMeta", "V1PodTemplateSpec"):
        part = {"V1ObjectMeta": "metadata", "V1PodTemplateSpec": "template"}[kind]
        for version in VERSIONS:
            check_kubernetes({"apiVersion": "v1", "kind": "PodTemplate", part: value}, version)
    elif (model := getattr(models, kind, None)) is not None:
        names = {model.attribute_map[name]: name for name in model.openapi_types}
        assert value.keys() <= names.keys()
        for key, each in value.items():
            check_kubeflow(each, model.openapi_types[names[key]])
        model(**{names[key]: each for key, each in value.items()})  # refuses to be without what is required
    else:
        assert type(value) is {"str": str, "int": int, "bool": bool}[kind], kind


def check_kubernetes(document: dict[str, Any], version: str) -> None:
    """Hold a document against the schema that Kubernetes publishes, which allows no other keys."""
    assert document["apiVersion"] in ("v1", "batch/v1")
    validate(document, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_indexed_job_fits_the_schema_of_kubernetes(version: str) -> None:
    for document in documents("indexed-job.yaml"):
        check_kubernetes(document, version)


def test_the_pytorch_job_fits_the_api_of_kubeflow() -> None:
    [job] = documents("pytorchjob.yaml")
    check_kubeflow(job, "KubeflowOrgV1PyTorchJob")


def check_trainer(document: dict[str, Any]) -> None:
    """Hold a document against the API of Kubeflow Trainer 2, as its own client declares it, and its job as a Job.

    The client's models drop what they do not know, so a document that they know whole comes back as it was.
    """
    kinds = {
        "TrainJob": trainer_models.TrainerV1alpha1TrainJob,
        "TrainingRuntime": trainer_models.TrainerV1alpha1TrainingRuntime,
    }
    model = kinds[document["kind"]].from_dict(document)
    assert model is not None
    assert model.to_dict() == document
    for job in document["spec"].get("template", {}).get("spec", {}).get("replicatedJobs", []):
        for version in VERSIONS:
            whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
            check_kubernetes(whole, version)


def test_the_train_job_fits_the_api_of_kubeflow_trainer() -> None:
    for document in documents("trainjob.yaml"):
        check_trainer(document)


def changed(document: dict[str, Any], place: str, key: str, value: Any) -> dict[str, Any]:
    """A copy of a document with a key set at a place in it, or removed."""
    copied: dict[str, Any] = copy.deepcopy(document)
    part: Any = copied
    for step in filter(None, place.split(".")):
        part = part[int(step) if isinstance(part, list) else step]
    if value is None:
        del part[key]
    else:
        part[key] = value
    return copied


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("spec", "completionmode", "Indexed"),
        ("spec", "completions", "2"),
        ("spec.podFailurePolicy.rules.0", "action", None),
        ("spec.podFailurePolicy.rules.0.onExitCodes", "value", [42]),
        ("spec.template.spec", "subDomain", "distgan"),
        ("spec.template.spec", "containers", None),
        ("spec.template.spec.containers.0", "volumeMount", []),
        ("spec.template.spec.containers.0.env.0", "value", 2),
        ("spec.template.spec.containers.0.resources", "limit", {}),
        ("spec.template.spec.volumes.1.emptyDir", "sizelimit", "8Gi"),
    ],
)
def test_the_schema_of_kubernetes_tells_a_mistake(place: str, key: str, value: Any) -> None:
    _, job = documents("indexed-job.yaml")
    for version in VERSIONS:
        with pytest.raises(ValidationError) as caught:
            check_kubernetes(changed(job, place, key, value), version)
        assert key in (caught.value.message.split("'")[1], *caught.value.path)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("spec", "nprocPerNodes", "8"),
        ("spec", "nprocPerNode", 8),
        ("spec", "pytorchReplicaSpecs", None),
        ("spec.elasticPolicy", "maxRestart", 3),
        ("spec.runPolicy", "backoffLimits", 100),
        ("spec.pytorchReplicaSpecs.Worker", "replicas", "2"),
        ("spec.pytorchReplicaSpecs.Worker.template.spec", "restartpolicy", "Never"),
        ("spec.pytorchReplicaSpecs.Worker.template.spec.containers.0", "volumeMount", []),
    ],
)
def test_the_api_of_kubeflow_tells_a_mistake(place: str, key: str, value: Any) -> None:
    [job] = documents("pytorchjob.yaml")
    with pytest.raises((AssertionError, ValueError, ValidationError)):
        check_kubeflow(changed(job, place, key, value), "KubeflowOrgV1PyTorchJob")


@pytest.mark.parametrize(
    ("number", "place", "key", "value"),
    [
        (0, "spec", "mlpolicy", {}),
        (0, "spec.template.spec.replicatedJobs.0", "name", None),
        (0, "spec.template.spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0", "action", None),
        (0, "spec.template.spec.replicatedJobs.0.template.spec.template.spec.containers.0", "volumeMount", []),
        (1, "spec.runtimeRef", "name", None),
        (1, "spec.trainer", "numNode", 2),
        (1, "spec.trainer", "numNodes", "2"),
        (1, "spec.trainer.resourcesPerNode", "limit", {}),
    ],
)
def test_the_api_of_kubeflow_trainer_tells_a_mistake(number: int, place: str, key: str, value: Any) -> None:
    document = documents("trainjob.yaml")[number]
    with pytest.raises((AssertionError, ValueError, ValidationError)):
        check_trainer(changed(document, place, key, value))


def check_command(command: list[str]) -> None:
    assert command[1] == "train"
    assert os.access(ROOT / command[0].removeprefix("/opt/distgan/"), os.X_OK)


def check_pod(spec: dict[str, Any]) -> dict[str, Any]:
    """The only container of a pod that can save before it leaves."""
    assert spec["terminationGracePeriodSeconds"] >= 60
    [container] = spec["containers"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in mounted["/runs"]
    return container


def variables(container: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}


def test_the_indexed_job() -> None:
    service, job = documents("indexed-job.yaml")
    assert (service["apiVersion"], service["kind"], service["spec"]["clusterIP"]) == ("v1", "Service", "None")
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    container = check_pod(spec["template"]["spec"])
    check_command(container["command"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    # A policy for failed pods is only allowed with this.
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    environment = variables(container)
    assert spec["completions"] == spec["parallelism"] == int(environment["PET_NNODES"])
    # Pod 0 is NAME-0 in the subdomain of the service.
    host = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert environment["PET_RDZV_ENDPOINT"] == f"{host}:29400"
    assert environment["PET_RDZV_BACKEND"] == "c10d"
    assert environment["PET_LOCAL_ADDR"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert environment["PET_RDZV_ID"] == {
        "fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/controller-uid']"}
    }
    assert environment["PET_NPROC_PER_NODE"] == "8"
    rules = spec["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob", "Ignore"]
    assert rules[0]["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [42]}


def test_the_pytorch_job() -> None:
    [job] = documents("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == spec["elasticPolicy"]["minReplicas"] == spec["elasticPolicy"]["maxReplicas"]
    assert worker["restartPolicy"] == "ExitCode"
    container = check_pod(worker["template"]["spec"])
    assert container["name"] == "pytorch"
    check_command(container["command"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_the_train_job() -> None:
    runtime, job = documents("trainjob.yaml")
    assert {document["apiVersion"] for document in (runtime, job)} == {"trainer.kubeflow.org/v1alpha1"}
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    [node] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    # What the plugin for torch looks for.
    assert runtime["spec"]["mlPolicy"] == {"torch": {}}
    assert node["name"] == "node"
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pods, (_, indexed) = node["template"]["spec"], documents("indexed-job.yaml")
    container = check_pod(pods["template"]["spec"])
    assert container["name"] == "node"
    # It acts on exit codes and evictions as indexed-job.yaml does.
    assert (pods["backoffLimit"], pods["template"]["spec"]["restartPolicy"]) == (100, "Never")
    expected = copy.deepcopy(indexed["spec"]["podFailurePolicy"])
    expected["rules"][0]["onExitCodes"]["containerName"] = "node"
    assert pods["podFailurePolicy"] == expected
    check_command(job["spec"]["trainer"]["command"])
    environment = variables(container) | variables(job["spec"]["trainer"])
    assert environment["PET_RDZV_BACKEND"] == "c10d"
    # Kubeflow Trainer refuses a job that sets these.
    reserved = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
    assert not reserved & environment.keys()
    for name in ("PET_RDZV_ID", "PET_LOCAL_ADDR"):
        assert environment[name] == variables(indexed["spec"]["template"]["spec"]["containers"][0])[name]


@pytest.fixture
def pod(tmp_path: Path) -> dict[str, str]:
    """An environment in which torchrun and distgan do what SCRIPT and STANDING say."""
    (tmp_path / "torchrun").write_text(
        f'#!/bin/bash\nprintf "%q " "$@" "$PET_RDZV_CONF" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" > {tmp_path}/said\n'
        f'echo "$PET_RDZV_ENDPOINT" > {tmp_path}/endpoint\n'
        f'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > {tmp_path}/patience\neval "$SCRIPT"\n'
    )
    (tmp_path / "distgan").write_text(
        f'#!/bin/bash\nprintf "%q " "$@" > {tmp_path}/asked\n[ "$STANDING" = "no answer" ] && exit 75\n'
        '[ -n "$STANDING" ] && echo "$STANDING"\n'
    )
    (tmp_path / "sleep").write_text('#!/bin/bash\n[[ $1 == 0.* ]] && exec /bin/sleep "$1"\nexit 0\n')
    for name in ("torchrun", "distgan", "sleep"):
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "1", "PET_RDZV_ID": "job"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("standing", "script", "code"),
    [
        ("finished 100", "exit 0", 0),
        ("diverged 40 step 60: fid diverged", "exit 0", 0),
        ("preempted 40 stop request", "exit 0", 0),
        ("preempted 40 SIGTERM", "exit 0", 138),
        ("lost 40 rank 0: lost contact", "exit 1", 138),
        ("running 40", "exit 1", 138),
        ("killed 40", "exit 1", 138),
        ("unstarted 40", "exit 1", 138),
        ("out-of-memory 40 rank 1: out of memory", "exit 1", 138),
        ("failed 40 rank 0: ValueError", "exit 1", 42),
        ("", "exit 2", 42),
        ("no answer", "exit 1", 138),
    ],
)
def test_a_pod_ends_as_the_run_stands(pod: dict[str, str], standing: str, script: str, code: int) -> None:
    command = [str(FOLDER / "pod.sh"), "train", "x y.yaml", "seed=1"]
    result = subprocess.run(command, env=pod | {"STANDING": standing, "SCRIPT": script}, capture_output=True)
    assert result.returncode == code
    folder = Path(pod["PATH"].partition(":")[0])
    assert shlex.split((folder / "asked").read_text()) == ["status", "--launch", "job", "x y.yaml", "seed=1"]
    # The launcher must not kill ranks that save sooner than Kubernetes would.
    [worker] = [document for document in documents("indexed-job.yaml") if document["kind"] == "Job"]
    grace = worker["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert 0 < grace - int((folder / "patience").read_text()) <= 10
    said = shlex.split((folder / "said").read_text())
    assert said == ["-m", "distgan", "train", "x y.yaml", "seed=1", "is_host=0,read_timeout=600,join_timeout=600", "1"]


@pytest.mark.parametrize(
    ("variables", "endpoint"),
    [
        ({}, ""),
        ({"PET_MASTER_ADDR": "job-node-0-0.job", "PET_MASTER_PORT": "29500"}, "job-node-0-0.job:29500"),
        ({"PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "29500", "PET_RDZV_ENDPOINT": "b:1"}, "b:1"),
    ],
)
def test_pods_meet_at_the_address_that_the_operator_sets(
    pod: dict[str, str], tmp_path: Path, variables: dict[str, str], endpoint: str
) -> None:
    command = [str(FOLDER / "pod.sh"), "train", "x.yaml"]
    subprocess.run(command, env=pod | variables | {"STANDING": "finished 1", "SCRIPT": "exit 0"}, check=True)
    assert (tmp_path / "endpoint").read_text().strip() == endpoint


def test_an_evicted_pod_passes_it_on_and_waits(pod: dict[str, str], tmp_path: Path) -> None:
    script = (
        f"trap 'sleep 0.3; touch {tmp_path}/saved; exit 0' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    )
    environment = pod | {"STANDING": "preempted 40 SIGTERM", "SCRIPT": script}
    process = subprocess.Popen([str(FOLDER / "pod.sh"), "train", "x.yaml"], env=environment)
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 138
    assert (tmp_path / "saved").exists()
