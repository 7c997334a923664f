"""Web pages may ask where BLIP_CORS_ORIGINS has their origin."""

import requests

from benchmarks.harness import DEADLINE, EXAMPLES, Server, data_uri

PAGE = "https://pages.example"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type, prefer"}


def preflight(server: Server, origin: str) -> requests.Response:
    return requests.options(f"{server.url}/predictions", headers={"Origin": origin, **PREFLIGHT}, timeout=DEADLINE)


def test_no_page_may_ask_unless_it_is_named(server: Server) -> None:
    assert "Access-Control-Allow-Origin" not in preflight(server, PAGE).headers
    health = requests.get(f"{server.url}/health-check", headers={"Origin": PAGE}, timeout=DEADLINE)
    assert "Access-Control-Allow-Origin" not in health.headers


def test_a_page_that_is_named_may_ask_and_no_other() -> None:
    with Server({"BLIP_CORS_ORIGINS": f"http://localhost:3000,{PAGE}", "COG_MAX_CONCURRENCY": "1"}) as server:
        server.wait_for("READY")
        asked = preflight(server, PAGE)
        assert (asked.status_code, asked.headers["Access-Control-Allow-Origin"]) == (200, PAGE)
        assert preflight(server, "https://elsewhere.example").status_code == 400
        for inputs, status in (({"image": data_uri(EXAMPLES / "pair.jpg")}, 200), ({"image": "no"}, 422)):
            answer = server.predict(input=inputs, headers={"Origin": PAGE})
            assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (status, PAGE)
            assert "Retry-After" in answer.headers["Access-Control-Expose-Headers"]
