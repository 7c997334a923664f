"""Stands between SaladCloud's job queue worker and the Cog server of the same container.

The worker counts any HTTP 200 as a job done, but a prediction that failed is a 200 too, with status failed. The gate
answers 200 only for a prediction that succeeded, so that the queue tries a failed one again on another node and shows
it as failed in the end. It waits for a server that is starting or has no free slot: a refusal would use up one of the
job's four attempts. It listens on 127.0.0.1:5001 and forwards to PORT (5000). Standard library only.
"""

import http.client
import http.server
import json
import os
import time

LISTEN = int(os.environ.get("BLIP_QUEUE_PORT") or 5001)
SERVER = int(os.environ.get("PORT") or 5000)
PATIENCE = 60.0  # seconds to wait for a server that takes requests
TIMEOUT = 600.0  # seconds for one prediction


def forward(path: str, body: bytes) -> tuple[int, bytes]:
    """The server's HTTP status and answer, 503 while it is not there."""
    connection = http.client.HTTPConnection("127.0.0.1", SERVER, timeout=TIMEOUT)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        return 503, json.dumps({"detail": f"The server does not answer: {error}"}).encode()
    finally:
        connection.close()


def predict(path: str, body: bytes) -> tuple[int, bytes]:
    """Forward when there is a free slot; a prediction that did not succeed is a 500."""
    end = time.monotonic() + PATIENCE
    status, answer = forward(path, body)
    while status in (409, 503) and time.monotonic() < end:
        time.sleep(0.5)
        status, answer = forward(path, body)
    if status == 200 and json.loads(answer).get("status") != "succeeded":
        return 500, answer
    return status, answer


class Gate(http.server.BaseHTTPRequestHandler):
    """Answers each POST with what became of its prediction."""

    def do_POST(self) -> None:
        """One job."""
        status, answer = predict(self.path, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", LISTEN), Gate).serve_forever()
