"""scripts/deploy against answers of the API's recorded shape, and against a mock that validates every request."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.harness import DEADLINE, EXAMPLES, ROOT, Server, data_uri, free_port, wait_until
from tests.deploy.refusing import refusing_port

SPECIFICATION = ROOT.parent / "shared" / "saladcloud" / "salad-cloud.yaml"
DESCRIPTIONS = ROOT / "deploy" / "saladcloud"
GROUP = DESCRIPTIONS / "container-group.json"
QUEUE_GROUP = DESCRIPTIONS / "container-group-queue.json"
PROJECT = "/organizations/acme/projects/vision"
CONTAINERS = f"{PROJECT}/containers"
GPUS = {
    "RTX 3060 (12 GB)": "5ec4ad5a-6a2c-4b1e-8b3f-1b0f0d5c7e01",
    "RTX 4090 (24 GB)": "5ec4ad5a-6a2c-4b1e-8b3f-1b0f0d5c7e02",
}


@dataclass
class Request:
    """What the API was asked."""

    method: str
    path: str
    kind: str
    body: Any


def group(status: str, description: str = "") -> dict[str, Any]:
    """A container group as the API describes it, as far as it is read here."""
    return {
        "name": "blip",
        "replicas": 3,
        "networking": {"auth": True, "dns": "pear-blip.salad.cloud", "port": 5000, "protocol": "http"},
        "current_state": {"status": status, "description": description},
    }


def instances(*states: str, ready: int = 0) -> dict[str, Any]:
    """The list of instances in those states, the first of them ready."""
    return {
        "instances": [
            {"id": f"i{n}", "machine_id": f"m{n}", "state": state, "ready": n < ready, "version": 1,
             **({"pulling_progress": 40.0} if state == "downloading" else {})}
            for n, state in enumerate(states)
        ]
    }  # fmt: skip


@dataclass
class Api:
    """A server that answers like SaladCloud: each route has a list of answers, of which the last one stays."""

    routes: dict[tuple[str, str], list[tuple[int, Any]]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.routes[("GET", "/organizations/acme/gpu-classes")] = [
            (200, {"items": [{"id": known, "name": name, "prices": []} for name, known in GPUS.items()]})
        ]
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                kind = self.headers.get("Content-Type", "")
                api.requests.append(Request(self.command, self.path, kind, json.loads(body) if body else None))
                answers = api.routes.get((self.command, self.path), [(404, {"title": "Not Found", "status": 404})])
                status, answer = answers.pop(0) if len(answers) > 1 else answers[0]
                if self.headers.get("Salad-Api-Key") != "right":
                    status, answer = 401, {"title": "Unauthorized"}
                content = b"" if answer is None else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_PATCH = do_DELETE = do_GET  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def api() -> Iterator[Api]:
    serving = Api()
    yield serving
    serving.close()


def deploy(
    url: str, action: str, *arguments: str, key: str = "right", organization: str = "acme"
) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "deploy"), "saladcloud", action]
    command += ["--organization", organization, "--project", "vision", *arguments]
    environment = {**os.environ, "SALAD_API_KEY": key, "SALAD_API_URL": url}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False)


def test_create_sends_the_description_with_image_and_gpu_classes(api: Api) -> None:
    api.routes[("POST", CONTAINERS)] = [(201, group("pending"))]
    ended = deploy(api.url, "create", "--image", "acme/blip:1")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "SaladCloud took the request to create the container group blip.\n"
    assert "Left out, because SaladCloud does not offer them: RTX 2070 (8 GB)," in ended.stderr
    expected = json.loads(GROUP.read_text())
    expected["container"]["image"] = "acme/blip:1"
    expected["container"]["resources"]["gpu_classes"] = list(GPUS.values())
    assert api.requests[-1] == Request("POST", CONTAINERS, "application/json", expected)


def test_the_description_is_the_reference_deployment() -> None:
    described = json.loads(GROUP.read_text())
    assert described["replicas"] == 3
    assert {name: described["container"]["resources"][name] for name in ("cpu", "memory")} == {"cpu": 2, "memory": 8192}
    networking = described["networking"]
    assert (networking["port"], networking["auth"]) == (5000, True)
    assert networking["load_balancer"] == "least_number_of_connections"
    assert not networking["single_connection_limit"]


def test_a_dry_run_needs_no_key_and_sends_nothing(api: Api) -> None:
    ended = deploy(api.url, "create", "--image", "acme/blip:1", "--dry-run", key="")
    assert ended.returncode == 0, ended.stderr
    first, _, body = ended.stdout.partition("\n")
    assert first == f"POST {api.url}{CONTAINERS}"
    assert json.loads(body)["container"]["image"] == "acme/blip:1"
    assert api.requests == []


def test_update_sends_a_merge_patch_of_what_may_change(api: Api) -> None:
    api.routes[("PATCH", f"{CONTAINERS}/blip")] = [(200, group("running"))]
    assert deploy(api.url, "update", "--image", "acme/blip:2").returncode == 0
    sent = api.requests[-1]
    assert (sent.method, sent.kind) == ("PATCH", "application/merge-patch+json")
    assert sent.body["container"]["image"] == "acme/blip:2"
    assert sent.body["networking"] == {"port": 5000}
    assert "name" not in sent.body
    assert "restart_policy" not in sent.body


def test_a_group_behind_a_job_queue_gets_its_queue_once(api: Api) -> None:
    queues = f"{PROJECT}/queues"
    api.routes[("POST", queues)] = [(201, {"name": "blip"})]
    api.routes[("POST", CONTAINERS)] = [(201, group("pending"))]
    api.routes[("GET", f"{queues}/blip")] = [(404, None), (200, {"name": "blip"})]
    for _ in range(2):
        ended = deploy(api.url, "create", "--image", "acme/blip-queue:1", "--file", str(QUEUE_GROUP))
        assert ended.returncode == 0, ended.stderr
    posts = [request.path for request in api.requests if request.method == "POST"]
    assert posts == [queues, CONTAINERS, CONTAINERS]


def test_an_update_leaves_the_replicas_to_the_autoscaler(api: Api) -> None:
    api.routes[("PATCH", f"{CONTAINERS}/blip-queue")] = [(200, group("running"))]
    assert deploy(api.url, "update", "--image", "acme/blip:2", "--file", str(QUEUE_GROUP)).returncode == 0
    assert "replicas" not in api.requests[-1].body
    assert api.requests[-1].body["queue_autoscaler"]["min_replicas"] == 0


def test_status_prints_the_group_its_instances_and_its_address(api: Api) -> None:
    api.routes[("GET", f"{CONTAINERS}/blip")] = [(200, group("deploying"))]
    api.routes[("GET", f"{CONTAINERS}/blip/instances")] = [(200, instances("running", "downloading", ready=1))]
    assert deploy(api.url, "status").stdout.splitlines() == [
        "deploying, 1 of 3 ready (1 running, 1 downloading, image 40 % pulled)",
        "  m0  running  ready",
        "  m1  downloading",
        "https://pear-blip.salad.cloud",
    ]


def test_wait_prints_each_change_until_all_replicas_are_ready(api: Api) -> None:
    api.routes[("GET", f"{CONTAINERS}/blip")] = [(200, group("deploying")), (200, group("running"))]
    api.routes[("GET", f"{CONTAINERS}/blip/instances")] = [
        (200, instances("allocating")),
        (200, instances("running", "running", "running", ready=3)),
    ]
    ended = deploy(api.url, "wait")
    assert ended.returncode == 0, ended.stderr
    assert [line.partition(" ")[2] for line in ended.stdout.splitlines()] == [
        "deploying, 0 of 3 ready (1 allocating)",
        "running, 3 of 3 ready (3 running)",
    ]


def test_wait_ends_with_the_reason_when_the_group_fails(api: Api) -> None:
    api.routes[("GET", f"{CONTAINERS}/blip")] = [(200, group("failed", "the image cannot be pulled"))]
    api.routes[("GET", f"{CONTAINERS}/blip/instances")] = [(200, instances())]
    ended = deploy(api.url, "wait")
    assert ended.stderr == "deploy: The container group blip is failed: the image cannot be pulled.\n"
    assert ended.returncode == 1


def test_wait_ends_with_what_is_missing_when_the_time_is_over(api: Api) -> None:
    api.routes[("GET", f"{CONTAINERS}/blip")] = [(200, group("deploying"))]
    api.routes[("GET", f"{CONTAINERS}/blip/instances")] = [(200, instances())]
    ended = deploy(api.url, "wait", "--timeout", "0.1")
    assert ended.stderr == "deploy: The container group blip is not ready after 0 s: deploying, 0 of 3 ready.\n"
    assert ended.returncode == 1


def test_delete_deletes_the_group(api: Api) -> None:
    api.routes[("DELETE", f"{CONTAINERS}/blip")] = [(202, None)]
    assert deploy(api.url, "delete").stdout == "SaladCloud took the request to delete the container group blip.\n"


def test_a_request_is_repeated_after_too_many_requests(api: Api) -> None:
    api.routes[("POST", CONTAINERS)] = [(429, {"title": "Too Many Requests"}), (201, group("pending"))]
    assert deploy(api.url, "create", "--image", "acme/blip:1").returncode == 0


def test_a_creation_is_not_repeated_after_a_fault_of_the_server(api: Api) -> None:
    api.routes[("POST", CONTAINERS)] = [(503, None), (201, group("pending"))]
    ended = deploy(api.url, "create", "--image", "acme/blip:1")
    assert ended.stderr.endswith("deploy: SaladCloud answers POST /projects/vision/containers with HTTP 503.\n")


@pytest.mark.parametrize(
    ("arguments", "key", "sentence"),
    [
        (["status"], "", "Set SALAD_API_KEY to an API key of the organization."),
        (
            ["status"],
            "wrong",
            "SaladCloud refuses the API key for /projects/vision/containers/blip; "
            "check SALAD_API_KEY and the organization's name.",
        ),
        (
            ["status"],
            "right",
            "SaladCloud has no /projects/vision/containers/blip; check the names, or create it first.",
        ),
        (["create"], "right", "Name the pushed image with --image to create the container group."),
        (
            ["create", "--image", "x", "--file", "/no/file"],
            "right",
            "/no/file cannot be read: No such file or directory.",
        ),
        (
            ["create", "--image", "x"],
            "right",
            "SaladCloud answers POST /projects/vision/containers with HTTP 400: The image is private.",
        ),
    ],
)
def test_an_error_is_one_sentence(api: Api, arguments: list[str], key: str, sentence: str) -> None:
    api.routes[("POST", CONTAINERS)] = [(400, {"detail": "The image is private.", "status": 400})]
    ended = deploy(api.url, *arguments, key=key)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[-1] == f"deploy: {sentence}"


def test_gpu_classes_that_are_all_unknown_are_an_error(api: Api) -> None:
    api.routes[("GET", "/organizations/acme/gpu-classes")] = [(200, {"items": []})]
    ended = deploy(api.url, "create", "--image", "x")
    assert ended.stderr.startswith("deploy: SaladCloud offers none of these GPU classes: RTX 2070 (8 GB), ")


def test_a_server_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    described = json.loads(GROUP.read_text())
    del described["container"]["resources"]["gpu_classes"]
    description = tmp_path / "cpu.json"
    description.write_text(json.dumps(described))
    with refusing_port() as port:
        url = f"http://127.0.0.1:{port}"
        ended = deploy(url, "create", "--image", "x", "--file", str(description))
    assert ended.stderr == f"deploy: SaladCloud cannot be reached at {url}/organizations/acme: ConnectionError.\n"


@pytest.fixture(scope="module")
def prism(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A mock that refuses a request which breaks the official specification."""
    if not SPECIFICATION.is_file() or shutil.which("npx") is None:
        pytest.skip("needs npx, and SaladCloud's specification beside the repository")
    port = free_port()
    log_path = tmp_path_factory.mktemp("prism") / "log"
    command = ["npx", "--yes", "--prefer-offline", "@stoplight/prism-cli@5.14.2", "mock"]
    command += ["--port", str(port), str(SPECIFICATION)]
    with log_path.open("w") as log:
        impatient = {**os.environ, "npm_config_fetch_timeout": "20000", "npm_config_fetch_retries": "0"}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=impatient, start_new_session=True)
    try:
        wait_until(lambda: "is listening" in log_path.read_text() or process.poll() is not None, "Prism")
        if process.poll() is not None:
            pytest.skip("npm could not fetch Prism")
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 15)  # npx starts Prism as a child
        process.wait(DEADLINE)


@pytest.fixture
def mocked(tmp_path: Path) -> Callable[[Path], str]:
    """Makes a description name the one GPU class that the mock offers."""

    def change(described: Path) -> str:
        document = json.loads(described.read_text())
        document["container"]["resources"]["gpu_classes"] = ["string"]
        changed = tmp_path / described.name
        changed.write_text(json.dumps(document))
        return str(changed)

    return change


@pytest.mark.parametrize("described", [GROUP, QUEUE_GROUP], ids=["gateway", "queue"])
@pytest.mark.parametrize("action", ["create", "update", "status", "delete"])
def test_every_call_fits_the_official_specification(
    prism: str, mocked: Callable[[Path], str], described: Path, action: str
) -> None:
    ended = deploy(prism, action, "--image", "acme/blip:1", "--file", mocked(described))
    assert ended.returncode == 0, ended.stderr


def test_wait_reads_what_the_official_specification_says(prism: str, mocked: Callable[[Path], str]) -> None:
    ended = deploy(prism, "wait", "--timeout", "0.1", "--file", mocked(GROUP))
    assert ended.stderr.startswith("deploy: The container group blip is not ready after 0 s: pending, ")


def test_the_mock_refuses_what_breaks_the_specification(prism: str, mocked: Callable[[Path], str]) -> None:
    changed = Path(mocked(GROUP))
    document = json.loads(changed.read_text())
    document["readiness_probe"]["failure_threshold"] = 21
    changed.write_text(json.dumps(document))
    assert "with HTTP 4" in deploy(prism, "create", "--image", "acme/blip:1", "--file", str(changed)).stderr


@pytest.fixture
def gate(server: Server) -> Iterator[str]:
    """The gate between a job queue's worker and the server."""
    port = free_port()
    environment = {**os.environ, "PORT": str(server.port), "BLIP_QUEUE_PORT": str(port)}
    process = subprocess.Popen(
        [sys.executable, str(DESCRIPTIONS / "queue_gate.py")], env=environment, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}/predictions"

    def listens() -> bool:
        try:
            return requests.get(url, timeout=DEADLINE).status_code == 501  # it takes POST only
        except requests.ConnectionError:
            return False

    try:
        wait_until(listens, "the gate")
        yield url
    finally:
        process.terminate()
        process.wait(DEADLINE)


def test_behind_a_job_queue_only_a_prediction_that_succeeded_is_a_200(gate: str) -> None:
    image = data_uri(EXAMPLES / "pair.jpg")
    good = requests.post(gate, json={"input": {"image": image}}, timeout=DEADLINE)
    assert (good.status_code, good.json()["status"]) == (200, "succeeded")
    bad = requests.post(gate, json={"input": {"image": "data:image/jpeg;base64,AAAA"}}, timeout=DEADLINE)
    assert (bad.status_code, bad.json()["status"]) == (500, "failed")
    assert bad.json()["error"].startswith("image is not a picture")
