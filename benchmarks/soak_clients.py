"""The clients of soak.py."""

import json
import random
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

from benchmarks.harness import TIMEOUT, Peer, Server
from benchmarks.soak_cases import Case, judge

BAD, ASYNC = 0.15, 0.05  # shares of the requests
CAPACITY_CLIENTS = 16


@dataclass(frozen=True)
class Answer:
    """What became of a request: when it ended and how long it took from when it was due, in seconds."""

    case: Case
    outcome: str  # one of OUTCOMES
    detail: str
    ended: float
    seconds: float


@dataclass
class Clients:
    """Ask the server and judge its answers; `peer` has the pictures that requests name, and receives their webhooks."""

    server: Server
    peer: Peer
    good: list[Case]
    bad: list[Case]
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._hooks: dict[str, Future[dict[str, Any]]] = {}  # what webhooks will say, by prediction id
        self.peer.received = lambda prediction: self._hooks[prediction["id"]].set_result(prediction)

    def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Send one request on a new connection, which the server cannot have closed already."""
        with closing(self.server.connect()) as connection:
            return connection.post(path, body, headers)

    def ask_any(self, rng: random.Random, due: float) -> None:
        """Ask one request of the mix; instead of some bad ones, ask a good one and cancel it."""
        choice, cancel = rng.random(), rng.randrange(len(self.bad) + 1) == 0
        case = rng.choice(self.bad if choice < BAD and not cancel else self.good)
        try:
            if case.expected is None or choice >= BAD + ASYNC:
                outcome, detail = judge(case, *self.post("/predictions", case.body))
            else:
                outcome, detail = self.ask_async(case, cancel=choice < BAD)
        except (OSError, HTTPException) as error:
            outcome, detail = "lost", repr(error)
        now = time.monotonic()
        self.answers.append(Answer(case, outcome, detail, now, now - due))

    def ask_async(self, case: Case, cancel: bool) -> tuple[str, str]:
        """Ask with a webhook, cancelling at once or not, and judge what the webhook says."""
        name = uuid.uuid4().hex
        hook: Future[dict[str, Any]] = Future()
        self._hooks[name] = hook
        more = {"id": name, "webhook": f"{self.peer.url}/hook", "webhook_events_filter": ["completed"]}
        body = json.dumps({**json.loads(case.body), **more}).encode()
        try:
            status, answer = self.post("/predictions", body, {"Prefer": "respond-async"})
            if status != 202:
                return judge(case, status, answer)
            if cancel:
                status, answer = self.post(f"/predictions/{name}/cancel", b"")
                if status not in (200, 404):  # 404: it was done already
                    return "lost", f"cancelling: HTTP {status}: {answer[:200]!r}"
            prediction = hook.result(TIMEOUT)
        except TimeoutError:
            return "lost", f"{'cancelled' if cancel else 'asynchronous'}, and no webhook in {TIMEOUT:.0f} s"
        finally:
            del self._hooks[name]
        if cancel and prediction["status"] == "canceled":
            return "canceled", ""
        return judge(case, 200, json.dumps(prediction).encode())

    def closed_loop(self, seconds: float) -> float:
        """Answers per second, refusals apart, to clients that ask one request after another."""
        started = time.monotonic()

        def client(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < started + seconds:
                self.ask_any(rng, time.monotonic())

        with ThreadPoolExecutor(CAPACITY_CLIENTS) as pool:
            list(pool.map(client, range(CAPACITY_CLIENTS)))
        end = started + seconds
        return sum(answer.outcome != "refused" and answer.ended < end for answer in self.answers) / seconds

    def open_loop(self, rate: float, end: float, over: threading.Event) -> None:
        """Ask at random times, `rate` per second on average, until `end` or `over`; return when all are answered."""
        rng, due = random.Random(0), time.monotonic()
        with ThreadPoolExecutor(128) as pool:
            asked = []
            while (due := due + rng.expovariate(rate)) < end and not over.is_set():
                time.sleep(max(0.0, due - time.monotonic()))
                asked.append(pool.submit(self.ask_any, random.Random(rng.random()), due))
            for one in asked:
                one.result()
