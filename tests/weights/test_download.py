"""Downloads survive what networks do, and end in exactly the published bytes or in one plain sentence."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from blip.errors import BundleError
from blip.weights import download
from blip.weights.download import File, fetch
from tests.weights.small_upstream import Mirror

CONTENT = bytes(range(256)) * 2000  # 512 kB


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.0)


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "x.pth").write_bytes(CONTENT)
    serving = Mirror(tmp_path / "served")
    yield serving
    serving.close()


def fetched(mirror: Mirror, folder: Path, sha256: str | None = None) -> Path:
    return fetch(File(f"{mirror.url}/x.pth", len(CONTENT), sha256), folder / "downloads", lambda line: print(line))


def assert_whole(path: Path) -> None:
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path], "something was left beside the file"


def test_a_file_arrives_whole_and_alone(mirror: Mirror, tmp_path: Path) -> None:
    assert_whole(fetched(mirror, tmp_path))


def test_a_file_that_is_there_is_not_asked_for_again(mirror: Mirror, tmp_path: Path) -> None:
    fetched(mirror, tmp_path)
    assert_whole(fetched(mirror, tmp_path))
    assert mirror.requests["x.pth"] == 1


@pytest.mark.parametrize("fault", ["drop", "short"])
def test_a_broken_connection_is_continued_where_it_broke(mirror: Mirror, tmp_path: Path, fault: str) -> None:
    mirror.faults["x.pth"] = [fault] * 3
    assert_whole(fetched(mirror, tmp_path))
    assert mirror.sent["x.pth"] < len(CONTENT) * 1.3


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(mirror: Mirror, tmp_path: Path, status: int) -> None:
    mirror.faults["x.pth"] = ["drop", status, status]
    assert_whole(fetched(mirror, tmp_path))


def test_a_server_without_ranges_is_asked_for_the_whole_file_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.ranges = False
    mirror.faults["x.pth"] = ["drop"]
    assert_whole(fetched(mirror, tmp_path))


def test_a_file_that_changed_meanwhile_is_started_over(mirror: Mirror, tmp_path: Path) -> None:
    old = bytes(len(CONTENT))
    (mirror.directory / "x.pth").write_bytes(old)
    mirror.faults["x.pth"] = ["drop", *[404]]
    with pytest.raises(BundleError, match="404"):
        fetched(mirror, tmp_path)
    (mirror.directory / "x.pth").write_bytes(CONTENT)
    assert_whole(fetched(mirror, tmp_path))


def test_a_byte_changed_on_the_way_is_noticed_by_the_declared_md5(mirror: Mirror, tmp_path: Path) -> None:
    mirror.faults["x.pth"] = ["wrong"]
    assert_whole(fetched(mirror, tmp_path))
    assert mirror.requests["x.pth"] == 2


def test_a_byte_changed_on_the_way_is_noticed_by_the_known_sha256(mirror: Mirror, tmp_path: Path) -> None:
    mirror.hashes = False
    mirror.faults["x.pth"] = ["wrong"]
    assert_whole(fetched(mirror, tmp_path, hashlib.sha256(CONTENT).hexdigest()))


def test_a_file_that_is_always_damaged_is_given_up(mirror: Mirror, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"x\.pth cannot be downloaded"):
        fetched(mirror, tmp_path, "0" * 64)
    assert not (tmp_path / "downloads" / "x.pth").exists()


@pytest.mark.parametrize("state", ["no origin", "broken origin", "complete", "too long"])
def test_any_state_that_a_kill_can_leave_is_continued(mirror: Mirror, tmp_path: Path, state: str) -> None:
    mirror.faults["x.pth"] = ["drop", 404]
    with pytest.raises(BundleError):
        fetched(mirror, tmp_path)
    partial = tmp_path / "downloads" / "x.pth.partial"
    origin = tmp_path / "downloads" / "x.pth.origin"
    assert partial.exists()
    assert origin.exists()
    if state == "no origin":
        origin.unlink()
    elif state == "broken origin":
        origin.write_text('{"version')
    else:
        partial.write_bytes(CONTENT + (b"x" if state == "too long" else b""))
    assert_whole(fetched(mirror, tmp_path))


def test_a_file_of_another_size_is_refused_before_it_is_downloaded(mirror: Mirror, tmp_path: Path) -> None:
    (mirror.directory / "x.pth").write_bytes(CONTENT[:-1])
    with pytest.raises(BundleError, match=rf"x\.pth has {len(CONTENT) - 1} bytes instead of {len(CONTENT)}"):
        fetched(mirror, tmp_path)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_said_at_once(mirror: Mirror, tmp_path: Path, status: int) -> None:
    mirror.faults["x.pth"] = [status]
    with pytest.raises(BundleError, match=rf"x\.pth was refused with HTTP status {status}"):
        fetched(mirror, tmp_path)
    assert mirror.requests["x.pth"] == 1


def test_without_a_network_one_sentence_says_what_can_be_done(mirror: Mirror, tmp_path: Path) -> None:
    mirror.close()
    with pytest.raises(BundleError) as caught:
        fetched(mirror, tmp_path)
    assert re.fullmatch(
        r"http://\S+/x\.pth cannot be downloaded \(ConnectionError\); check the network, set BLIP_MIRROR, "
        r"or give the files yourself as docs/models.md says\.",
        str(caught.value),
    )


@pytest.mark.parametrize("url", ["nonsense/x.pth", "ftp://localhost/x.pth", "http:///x.pth"])
def test_a_mirror_that_is_no_http_url_is_refused_at_once(tmp_path: Path, url: str) -> None:
    with pytest.raises(BundleError, match="cannot be downloaded"):
        fetch(File(url, 1), tmp_path, print)
