"""The page at / and the API's documentation, in a real browser."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect, sync_playwright

from benchmarks.harness import DEADLINE, EXAMPLES, Server, data_uri, wait_until
from tests.peers import FileServer

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium; scripts/need chromium installs it")

PAIR = EXAMPLES / "pair.jpg"
HOST = "blip.test"  # a page from there came over plain HTTP; one from this machine counts as secure
OPTIONS = ("--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking")
CAPTION = "a large red circle to the left of a small blue square"
BROWSERS = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
expect.set_options(timeout=DEADLINE * 1000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*OPTIONS, f"--host-resolver-rules=MAP {HOST} 127.0.0.1"]
        )
        yield browser
        browser.close()


class Watched:
    """A page in a browser of its own, and what it did that it should not.

    Attributes:
        elsewhere: the addresses at other hosts that it asked for.
        complaints: errors, and what its Content-Security-Policy refused.
    """

    def __init__(self, browser: Browser, url: str, **options: str | dict[str, int]) -> None:
        self.context = browser.new_context(**options)  # type: ignore[arg-type]
        self.context.set_default_timeout(DEADLINE * 1000)
        self.page: Page = self.context.new_page()
        self.url, self.elsewhere, self.complaints = url, [], []
        self.page.route("**/*", self._look)
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    url: str
    elsewhere: list[str]
    complaints: list[str]

    def _look(self, route: Route) -> None:
        if not route.request.url.startswith((self.url, f"blob:{self.url}")):
            self.elsewhere.append(route.request.url)
        route.continue_()

    def _listen(self, message: ConsoleMessage) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:  # an answer that is not 200
            self.complaints.append(message.text)

    def open(self, path: str = "/") -> Page:
        self.page.goto(f"{self.url}{path}")
        return self.page


@pytest.fixture
def watched(browser: Browser, server: Server) -> Iterator[Watched]:
    watched = Watched(browser, server.url)
    watched.open()
    expect(watched.page.locator("#health")).to_have_text("Ready")
    yield watched
    watched.context.close()
    assert (watched.elsewhere, watched.complaints) == ([], [])


def drop(page: Page, path: Path) -> None:
    """Drop a file on the page, as a file manager does."""
    transfer = page.evaluate_handle(
        """([name, bytes]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], name, {type: "image/jpeg"}));
            return transfer;
        }""",
        [path.name, list(path.read_bytes())],
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


def answer(page: Page) -> str:
    """What the page shows once the prediction has ended."""
    expect(page.locator("#time")).to_contain_text(" s")
    expect(page.locator("#cancel")).to_be_hidden()
    return page.locator("#answer").inner_text()


def asked(server: Server, task: str, **texts: str) -> str:
    return str(server.predict(input={"image": data_uri(PAIR), "task": task, **texts}).json()["output"])


def test_a_dropped_picture_is_captioned(watched: Watched) -> None:
    drop(watched.page, PAIR)
    expect(watched.page.locator("#name")).to_contain_text("pair.jpg, 0.01 MB")
    expect(watched.page.locator("#preview")).to_be_visible()
    watched.page.click("#ask")
    assert answer(watched.page) == CAPTION
    assert "in the model" in watched.page.locator("#time").inner_text()
    assert not watched.page.locator("#scores").is_visible()


def test_a_question_about_a_dropped_picture_is_answered(watched: Watched, server: Server) -> None:
    drop(watched.page, PAIR)
    watched.page.get_by_text("Question", exact=True).first.click()
    watched.page.fill("#question", "what color is the circle?")
    watched.page.keyboard.press("Enter")
    expected = asked(server, "visual_question_answering", question="what color is the circle?")
    assert f"Answer: {answer(watched.page)}" == expected


def test_a_text_is_matched_with_a_dropped_picture_and_a_bar_shows_how_well(watched: Watched, server: Server) -> None:
    drop(watched.page, PAIR)
    watched.page.get_by_text("Match", exact=True).click()
    watched.page.fill("#caption", "a red circle")
    watched.page.click("#ask")
    shown = answer(watched.page)
    said = asked(server, "image_text_matching", caption="a red circle")
    probability = float(said.split("probability of ")[1].split("%")[0])
    assert shown == f"{probability:.1f} % likely to fit"
    assert float(watched.page.locator("#match").evaluate("bar => bar.value")) == pytest.approx(probability / 100)
    similarity = said.rsplit(" ", 1)[1].rstrip(".")
    assert f"Cosine similarity {similarity}. " in watched.page.locator("#time").inner_text()


def test_a_picture_or_an_address_can_be_pasted_and_an_address_typed(watched: Watched, files: FileServer) -> None:
    page = watched.page
    page.evaluate(
        """bytes => {
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([new Uint8Array(bytes)], "image.png", {type: "image/png"}));
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData, bubbles: true}));
        }""",
        list(PAIR.read_bytes()),
    )
    expect(page.locator("#name")).to_contain_text("image.png")
    page.evaluate(
        """address => {
            const clipboardData = new DataTransfer();
            clipboardData.setData("text/plain", address);
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData, bubbles: true}));
        }""",
        f"{files.url}/pair.jpg",
    )
    expect(page.locator("#address")).to_have_value(f"{files.url}/pair.jpg")
    page.click("#ask")
    assert answer(page) == CAPTION
    page.fill("#address", f"{files.url}/status/404")
    page.click("#ask")
    expect(page.locator("#problem")).to_contain_text("404")


def test_the_keyboard_alone_is_enough(watched: Watched, files: FileServer) -> None:
    press, page = watched.page.keyboard.press, watched.page
    press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    press("Tab")
    page.keyboard.type(f"{files.url}/pair.jpg")
    press("Tab")
    press("ArrowRight")
    press("Tab")
    page.keyboard.type("what color is the circle?")
    press("Tab")
    assert page.evaluate("document.activeElement.id") == "ask"
    press("Space")
    assert answer(page) == "red"


def test_what_the_server_refuses_is_shown_in_its_own_words(watched: Watched, tmp_path: Path) -> None:
    page, problem = watched.page, watched.page.locator("#problem")
    page.click("#ask")
    expect(problem).to_have_text("There is no picture; choose one, or type its address.")
    broken, large = tmp_path / "broken.jpg", tmp_path / "large.jpg"
    broken.write_bytes(b"no picture")
    page.set_input_files("#file", broken)
    expect(problem).to_be_empty()
    page.click("#ask")
    formats = "send a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC file."
    expect(problem).to_have_text(f"image is not a picture in a known format; {formats}")
    page.get_by_text("Question", exact=True).first.click()
    page.set_input_files("#file", PAIR)
    page.click("#ask")
    expect(problem).to_have_text("question is required for visual_question_answering")
    with large.open("wb") as file:
        file.truncate(60_000_000)
    page.set_input_files("#file", large)
    page.click("#ask")
    expect(problem).to_have_text("image is larger than 50 MB; send a smaller file.")
    page.fill("#address", "ftp://example.org/photo.jpg")
    page.click("#ask")
    expect(problem).to_have_text("image is not an http, https or data address; send one of these.")


@pytest.mark.parametrize(
    ("status", "body"), [(403, '{"message": "Forbidden"}'), (200, "<html>Sign in</html>"), (502, "")]
)
def test_an_answer_that_is_not_the_servers_is_said_to_be_one(watched: Watched, status: int, body: str) -> None:
    """Of a gateway in front."""
    watched.page.route("**/predictions", lambda route: route.fulfill(status=status, body=body))
    watched.page.set_input_files("#file", PAIR)
    watched.page.click("#ask")
    expect(watched.page.locator("#problem")).to_have_text(f"The server answered {status}.")


def wait_for_download(page: Page, files: FileServer) -> None:
    """Wait with the browser: a request of the page goes through this program."""

    def begun() -> bool:
        page.wait_for_timeout(50)
        return files.requests == 1

    wait_until(begun, "the download")


def test_another_picture_clears_what_was_said_of_the_first(watched: Watched, files: FileServer) -> None:
    page = watched.page
    page.set_input_files("#file", PAIR)
    page.click("#ask")
    assert answer(page) == CAPTION
    page.fill("#address", f"{files.url}/held/pair.jpg")
    expect(page.locator("#answer")).to_be_empty()
    page.click("#ask")
    wait_for_download(page, files)
    page.set_input_files("#file", EXAMPLES / "group.png")
    expect(page.locator("#cancel")).to_be_hidden()
    files.release.set()
    page.click("#ask")
    assert answer(page) != CAPTION


GIVEN = """([target, event, data]) => {
    const transfer = new DataTransfer();
    for (const [type, text] of Object.entries(data)) transfer.setData(type, text);
    const options = {bubbles: true, cancelable: true};
    const given = event === "drop"
        ? new DragEvent("drop", {...options, dataTransfer: transfer})
        : new ClipboardEvent("paste", {...options, clipboardData: transfer});
    document.querySelector(target).dispatchEvent(given);
    return given.defaultPrevented;
}"""


@pytest.mark.parametrize("event", ["drop", "paste"])
@pytest.mark.parametrize(
    "data",
    [
        {"text/plain": "https://e.example/1.jpg"},
        {"text/uri-list": "# a list\r\nhttps://e.example/1.jpg\r\nhttps://e.example/2.jpg"},
        {
            "text/uri-list": "https://e.example/page",
            "text/html": '<a href="/page"><img src="https://e.example/1.jpg"></a>',
        },
    ],
    ids=["text", "list", "picture in a link"],
)
def test_the_address_of_a_picture_is_taken(watched: Watched, event: str, data: dict[str, str]) -> None:
    assert watched.page.evaluate(GIVEN, ["#drop", event, data]) is True
    expect(watched.page.locator("#address")).to_have_value("https://e.example/1.jpg")


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_text_goes_where_it_is_put_and_nothing_usable_is_said_to_be_none(watched: Watched, event: str) -> None:
    page = watched.page
    page.get_by_text("Question", exact=True).first.click()
    assert page.evaluate(GIVEN, ["#question", event, {"text/plain": "https://e.example/1.jpg"}]) is False
    expect(page.locator("#address")).to_have_value("")
    page.evaluate(GIVEN, ["#drop", event, {"text/plain": "a cat"}])
    expect(page.locator("#problem")).to_contain_text("That is no picture and no address of one")


def test_a_file_that_is_gone_is_said_to_be(watched: Watched, tmp_path: Path) -> None:
    picture = tmp_path / "photo.jpg"
    picture.write_bytes(PAIR.read_bytes())
    watched.page.set_input_files("#file", picture)
    picture.unlink()
    watched.page.click("#ask")
    expect(watched.page.locator("#problem")).to_have_text("photo.jpg cannot be read; choose it again.")


def test_cancel_ends_the_prediction(watched: Watched, server: Server, files: FileServer) -> None:
    watched.page.fill("#address", f"{files.url}/held/pair.jpg")
    watched.page.click("#ask")
    wait_for_download(watched.page, files)
    with watched.page.expect_event("requestfailed") as ended:
        watched.page.click("#cancel")
    expect(watched.page.locator("#time")).to_have_text("Canceled.")
    expect(watched.page.locator("#ask")).to_be_focused()
    state = f"{server.url}/predictions/{json.loads(ended.value.post_data or '')['id']}"
    wait_until(lambda: requests.get(state, timeout=DEADLINE).json()["status"] == "canceled", "canceled")
    files.release.set()


def test_the_command_that_is_shown_gives_the_same_answer(watched: Watched, tmp_path: Path) -> None:
    page = watched.page
    picture = tmp_path / """it's a "pair"; of them, $HOME.jpg"""
    picture.write_bytes(PAIR.read_bytes())
    page.set_input_files("#file", picture)
    commands = [page.locator("#curl").inner_text()]
    page.get_by_text("Match", exact=True).click()
    page.fill("#caption", '@it\'s a "red" circle; $HOME\\')
    commands.append(page.locator("#curl").inner_text())
    page.fill("#address", data_uri(PAIR))
    commands.append(page.locator("#curl").inner_text())
    said = []
    for command in commands:
        ended = subprocess.run(
            ["bash", "-c", f"{command} -sS"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        said.append(json.loads(ended.stdout))
    assert [document["status"] for document in said] == ["succeeded"] * 3
    assert said[0]["output"] == f"Caption: {CAPTION}"
    assert said[1]["input"]["caption"] == said[2]["input"]["caption"] == '@it\'s a "red" circle; $HOME\\'
    assert said[1]["output"] == said[2]["output"]


@pytest.mark.parametrize("host", ["127.0.0.1", HOST])
def test_the_command_can_be_copied_over_plain_http_too(browser: Browser, server: Server, host: str) -> None:
    watched = Watched(browser, f"http://{host}:{server.port}")
    page = watched.open()
    page.set_input_files("#file", PAIR)
    page.click("#copy")
    expect(page.locator("#copied")).to_have_text("Copied.")
    page.click("#address")
    page.keyboard.press("Control+V")
    assert page.input_value("#address").startswith("curl -F image=@pair.jpg")
    watched.context.close()
    assert watched.complaints == []


def test_words_are_shown_as_they_come_where_the_server_streams(browser: Browser, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    stub = {"COG_PREDICT_TYPE_STUB": "tests/server/waiting_predict.py:Predictor", "BLIP_TEST_HOLD": str(hold)}
    with Server({**stub, "COG_MAX_CONCURRENCY": "2"}) as server:
        server.wait_for("STARTING")
        watched = Watched(browser, server.url)
        page = watched.open()
        expect(page.locator("#health")).to_have_text("Starting: the models are being loaded…")
        hold.unlink()
        expect(page.locator("#health")).to_have_text("Ready")
        hold.touch()
        page.set_input_files("#file", PAIR)
        page.click("#ask")
        expect(page.locator("#answer")).to_have_text("a large")
        expect(page.locator("#cancel")).to_be_visible()
        hold.unlink()
        assert answer(page) == CAPTION
        watched.context.close()
    assert (watched.elsewhere, watched.complaints) == ([], [])


def test_a_busy_server_is_asked_again_and_one_that_has_ended_is_said_to(browser: Browser, files: FileServer) -> None:
    with Server({"COG_MAX_CONCURRENCY": "1"}) as server:
        server.wait_for("READY")
        watched = Watched(browser, server.url)
        page = watched.open()
        other = subprocess.Popen(
            ["curl", "-sS", f"{server.url}/predictions", "-F", f"image={files.url}/held/pair.jpg"],
            stdout=subprocess.DEVNULL,
        )
        wait_until(lambda: files.requests == 1, "the download")
        page.set_input_files("#file", PAIR)
        page.click("#ask")
        expect(page.locator("#time")).to_contain_text("Asking again…")
        files.release.set()
        assert other.wait(DEADLINE) == 0
        assert answer(page) == CAPTION
    page.click("#ask")
    expect(page.locator("#problem")).to_contain_text("The server cannot be reached")
    expect(page.locator("#health")).to_have_text("The server does not answer")
    watched.context.close()


def test_the_page_says_why_a_start_failed(browser: Browser, tmp_path: Path) -> None:
    with Server({"BLIP_WEIGHTS": str(tmp_path)}, arguments=("--await-explicit-shutdown=true",)) as server:
        wait_until(lambda: server.health()["status"] == "SETUP_FAILED", "the failure")
        watched = Watched(browser, server.url)
        page = watched.open()
        expect(page.locator("#health")).to_contain_text("The start failed: ")
        expect(page.locator("#health")).to_contain_text(str(tmp_path))
        watched.context.close()
    assert watched.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_that_keeps_people_out(browser: Browser, server: Server, scheme: str) -> None:
    watched = Watched(browser, server.url, color_scheme=scheme)
    page = watched.open()
    expect(page.locator("#health")).to_have_text("Ready")
    reports = [Axe().run(page)]
    page.set_input_files("#file", PAIR)
    page.get_by_text("Match", exact=True).click()
    page.fill("#caption", "a red circle")
    page.click("#ask")
    answer(page)
    reports.append(Axe().run(page))
    page.fill("#caption", "")
    page.click("#ask")
    expect(page.locator("#problem")).not_to_be_empty()
    reports.append(Axe().run(page))
    watched.context.close()
    assert [report.generate_snapshot() for report in reports] == ["", "", ""]


@pytest.mark.parametrize("width", [320, 768])
def test_nothing_is_wider_than_the_screen(browser: Browser, server: Server, width: int, tmp_path: Path) -> None:
    watched = Watched(browser, server.url, viewport={"width": width, "height": 600})
    page = watched.open()
    picture = tmp_path / f"{'long' * 40}.jpg"
    picture.write_bytes(PAIR.read_bytes())
    page.set_input_files("#file", picture)
    page.click("#ask")
    assert answer(page) == CAPTION
    assert page.evaluate("document.documentElement.scrollWidth") == width
    watched.context.close()


@pytest.mark.parametrize(("path", "refused"), [("/docs", 0), ("/redoc", 1)])
def test_the_documentation_asks_no_other_host(browser: Browser, server: Server, path: str, refused: int) -> None:
    watched = Watched(browser, server.url)
    page = watched.open(path)
    expect(page.get_by_text("image-text match scores from three BLIP models").first).to_be_visible()
    watched.context.close()
    assert watched.elsewhere == []
    assert len(watched.complaints) == refused
    assert all("redoc.ly/redoc/logo-mini.svg" in complaint for complaint in watched.complaints)  # it would show a logo


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        (BROWSERS, True),
        ("text/html", True),
        ("application/json, TEXT/HTML", True),
        ("text/html;q=0.5, application/json", False),
        ("text/html;q=0", False),
        ("text/html;q=many", False),
        ("*/*", False),
        ("application/json", False),
        ("", False),
    ],
)
def test_only_who_asks_for_html_gets_the_page(server: Server, accept: str, html: bool) -> None:
    for method in ("GET", "HEAD"):
        got = requests.request(method, f"{server.url}/", headers={"Accept": accept}, timeout=DEADLINE)
        assert (got.status_code, got.headers["Vary"]) == (200, "Accept")
        assert got.headers["Content-Type"].partition(";")[0] == ("text/html" if html else "application/json")


def test_the_page_can_be_left_out() -> None:
    with Server({"BLIP_PAGE": "off"}) as server:
        server.wait_for("READY")
        got = requests.get(server.url, headers={"Accept": BROWSERS}, timeout=DEADLINE)
        assert got.json()["predictions_url"] == "/predictions"
