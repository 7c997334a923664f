"""SaladCloud's API, as far as a deployment needs it."""

import json
import time
from typing import Any

import requests

ATTEMPTS = 5  # for a request that meets a temporary fault

Json = dict[str, Any]


class DeployError(Exception):
    """What went wrong, in one sentence."""


class SaladCloud:
    """One project of one organization, over the API; with `dry_run` requests that change anything are only printed."""

    def __init__(self, url: str, key: str, organization: str, project: str, dry_run: bool) -> None:
        self._url = f"{url.rstrip('/')}/organizations/{organization}"
        self._project = f"/projects/{project}"
        self._dry_run = dry_run
        self._session = requests.Session()
        self._session.headers["Salad-Api-Key"] = key

    def gpu_classes(self) -> dict[str, str]:
        """The identifier of every GPU class by its name in lower case."""
        items = self._call("GET", "/gpu-classes")["items"]
        return {item["name"].lower(): item["id"] for item in items}

    def ensure_queue(self, name: str) -> None:
        """Create the job queue unless it is there."""
        if self._dry_run or self._call("GET", f"{self._project}/queues/{name}", missing_ok=True) is None:
            self._call("POST", f"{self._project}/queues", {"name": name})

    def create(self, group: Json) -> None:
        """Ask for a new container group."""
        self._call("POST", f"{self._project}/containers", group)

    def update(self, name: str, patch: Json) -> None:
        """Merge the patch into the container group."""
        self._call("PATCH", f"{self._project}/containers/{name}", patch)

    def group(self, name: str) -> Json:
        """The container group as it is."""
        document: Json = self._call("GET", f"{self._project}/containers/{name}")
        return document

    def instances(self, name: str) -> list[Json]:
        """The container group's instances."""
        found: list[Json] = self._call("GET", f"{self._project}/containers/{name}/instances")["instances"]
        return found

    def delete(self, name: str) -> None:
        """Delete the container group."""
        self._call("DELETE", f"{self._project}/containers/{name}")

    def _call(self, method: str, path: str, body: Json | None = None, missing_ok: bool = False) -> Any:
        """The answer's JSON, or None if there is none; temporary faults are tried again."""
        if self._dry_run and method != "GET":
            print(f"{method} {self._url}{path}")
            if body is not None:
                print(json.dumps(body, indent=2))
            return None
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        data = None if body is None else json.dumps(body)
        headers = {} if body is None else {"Content-Type": kind}
        for attempt in range(1, ATTEMPTS + 1):
            try:
                answer = self._session.request(method, f"{self._url}{path}", data=data, headers=headers, timeout=60)
                passing = answer.status_code == 429 or answer.status_code >= 500
                pause = answer.headers.get("Retry-After", "")
            except requests.RequestException as error:
                if attempt == ATTEMPTS or method == "POST":
                    raise DeployError(
                        f"SaladCloud cannot be reached at {self._url}: {type(error).__name__}."
                    ) from error
                pause = ""
            else:
                # After a server error a creation may still have happened, so it is not repeated.
                if not passing or attempt == ATTEMPTS or (method == "POST" and answer.status_code != 429):
                    break
            time.sleep(min(float(pause) if pause.isdecimal() else attempt, 30))
        if answer.ok:
            return answer.json() if answer.content else None
        if answer.status_code == 404 and missing_ok:
            return None
        raise DeployError(explain(answer, method, path))


def explain(answer: requests.Response, method: str, path: str) -> str:
    """One sentence on a refusal."""
    try:
        problem = answer.json()
        detail = str(problem.get("detail") or problem.get("title") or "") if isinstance(problem, dict) else ""
    except ValueError:
        detail = ""
    detail = detail.strip().rstrip(".")
    if answer.status_code in (401, 403):
        return f"SaladCloud refuses the API key for {path}; check SALAD_API_KEY and the organization's name."
    if answer.status_code == 404:
        return f"SaladCloud has no {path}; check the names, or create it first."
    return f"SaladCloud answers {method} {path} with HTTP {answer.status_code}{': ' + detail if detail else ''}."
