"""The decoding processes: what they give, and what ends them and what does not."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.harness import DEADLINE, EXAMPLES, POLL, ROOT
from benchmarks.processes import opened_by, own_decoders
from blip.engine.encoders import normalise
from blip.errors import ImageError
from blip.lavis import import_lavis, pixel_values
from blip.pictures import wire
from blip.pictures.limits import LARGE_TOTAL
from blip.pictures.pool import Pool, _Decoder, _Room
from tests.image_files import encoded

PAIR = EXAMPLES / "pair.jpg"
CRASHED = "image could not be read: decoding it crashed; save it anew or send another one."
TOO_SLOW = "image takes more than 20 s to decode; send a smaller one or save it anew."
TOO_HUNGRY = "image takes more than 1280 MiB of memory to decode; send a smaller one."


def slow_picture() -> bytes:
    """A BMP of runs of one pixel each, which Pillow reads in Python: it takes a minute."""
    width, height = 8000, 6000
    rows = (bytes([1, 7]) * width + b"\0\0") * 3000 + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + header + bytes(1024) + rows


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    path = tmp_path / "slow.bmp"
    path.write_bytes(slow_picture())
    return path


def with_pool(work: Callable[[Pool], Awaitable[None]]) -> None:
    async def main() -> None:
        pool = Pool()
        try:
            pool.wait()
            await asyncio.wait_for(work(pool), DEADLINE)
        finally:
            pool.close()

    asyncio.run(main())


def is_decoding(pid: int) -> bool:
    """Whether a process is in the middle of a picture: its time is limited, as from the first on, and a file open."""
    with contextlib.suppress(ProcessLookupError):  # it may end at any time
        is_limited = resource.prlimit(pid, resource.RLIMIT_CPU)[0] != resource.RLIM_INFINITY
        return is_limited and any(stat.S_ISREG(one.st_mode) for one in opened_by(pid).values())
    return False


async def until_decoding() -> int:
    """The first process that decodes."""
    while not (busy := [pid for pid in own_decoders() if is_decoding(pid)]):
        await asyncio.sleep(POLL)
    return busy[0]


async def refusal(pool: Pool, path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        await pool.pixels(path, 384)
    return str(caught.value)


async def still_works(pool: Pool) -> None:
    """All processes give pictures, more at a time than there are."""
    pixels = await asyncio.gather(*[pool.pixels(PAIR, 384) for _ in range(2 * len(own_decoders()) + 1)])
    assert all(found == pixels[0] for found in pixels)


@pytest.mark.parametrize("side", [224, 384, 480])
def test_the_normalised_pixels_are_what_lavis_makes_of_the_file(side: int) -> None:
    async def work(pool: Pool) -> None:
        pixels = torch.frombuffer(await pool.pixels(PAIR, side), dtype=torch.uint8).view(1, side, side, 3)
        processor = import_lavis().blip_processors.BlipImageEvalProcessor(image_size=side)
        assert normalise(pixel_values({}), pixels)[0].equal(processor(Image.open(PAIR).convert("RGB")))

    with_pool(work)


def test_relative_and_odd_paths_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = Path(os.fsdecode(b"p\xe4r \xff.jpg"))
    odd.write_bytes(PAIR.read_bytes())

    async def work(pool: Pool) -> None:
        assert await pool.pixels(odd, 8) == await pool.pixels(PAIR, 8)

    with_pool(work)


def test_requests_for_different_pictures_get_their_own(tmp_path: Path) -> None:
    colors = ["red", "lime", "blue", "white", "black"] * 8
    for color in set(colors):
        (tmp_path / color).write_bytes(encoded(Image.new("RGB", (50, 40), color), "PNG"))

    async def work(pool: Pool) -> None:
        found = await asyncio.gather(*[pool.pixels(tmp_path / color, 16) for color in colors])
        for color, pixels in zip(colors, found, strict=True):
            assert pixels == Image.new("RGB", (16, 16), color).tobytes()

    with_pool(work)


def test_cancelling_ends_the_decoding(slow: Path) -> None:
    async def work(pool: Pool) -> None:
        request = asyncio.create_task(pool.pixels(slow, 384))
        pid = await until_decoding()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await still_works(pool)
        assert pid not in own_decoders()

    with_pool(work)


def test_cancelling_what_waits_for_a_process_leaves_the_others_alone(slow: Path) -> None:
    async def work(pool: Pool) -> None:
        before = own_decoders()
        requests = [asyncio.create_task(pool.pixels(slow, 384)) for _ in before]
        waiting = asyncio.create_task(pool.pixels(PAIR, 384))
        await until_decoding()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert own_decoders() == before
        for request in requests:
            request.cancel()
        await asyncio.wait(requests)
        await still_works(pool)

    with_pool(work)


@pytest.mark.parametrize("fault", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT, signal.SIGBUS])
def test_a_crash_is_one_sentence_and_a_new_process(slow: Path, fault: signal.Signals) -> None:
    async def work(pool: Pool) -> None:
        request = asyncio.create_task(refusal(pool, slow))
        os.kill(await until_decoding(), fault)
        assert await request == CRASHED
        await still_works(pool)

    with_pool(work)


def test_a_picture_that_takes_too_much_processor_time_is_one_sentence(slow: Path) -> None:
    async def work(pool: Pool) -> None:
        request = asyncio.create_task(refusal(pool, slow))
        pid = await until_decoding()
        assert resource.prlimit(pid, resource.RLIMIT_CPU)[0] <= 30
        resource.prlimit(pid, resource.RLIMIT_CPU, (1, resource.RLIM_INFINITY))  # so that it takes less long
        assert await request == TOO_SLOW
        await still_works(pool)

    with_pool(work)


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_one_sentence() -> None:
    async def work(pool: Pool) -> None:
        for pid in own_decoders():
            os.kill(pid, signal.SIGSTOP)
        assert await refusal(pool, PAIR) == TOO_SLOW

    with_pool(work)


def test_a_picture_that_takes_too_much_memory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(encoded(Image.new("L", (8000, 8000)), "PNG"))

    async def work(pool: Pool) -> None:
        for pid in own_decoders():
            assert resource.prlimit(pid, resource.RLIMIT_DATA) == (1280 << 20, 1280 << 20)
            resource.prlimit(pid, resource.RLIMIT_DATA, (100 << 20, 1280 << 20))
        assert await refusal(pool, tmp_path / "large") == TOO_HUNGRY
        await still_works(pool)

    with_pool(work)


def test_a_process_that_ended_while_idle_is_replaced() -> None:
    async def work(pool: Pool) -> None:
        gone = own_decoders()
        for pid in gone:
            os.kill(pid, signal.SIGKILL)
        while any(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" for pid in gone):
            await asyncio.sleep(POLL)
        await still_works(pool)

    with_pool(work)


def test_signals_to_the_group_do_not_end_them() -> None:
    async def work(pool: Pool) -> None:
        before = own_decoders()
        for pid in before:
            for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(pid, name)
        await still_works(pool)
        assert own_decoders() == before

    with_pool(work)


def test_they_hold_nothing_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_AUTH_TOKEN", "secret")

    async def work(pool: Pool) -> None:
        await pool.pixels(PAIR, 8)
        for pid in own_decoders():
            opened, lifeline = opened_by(pid), lifeline_of(pid)
            assert {name for name, one in opened.items() if stat.S_ISSOCK(one.st_mode)} == {"0", lifeline}
            assert opened.keys() == {"0", "1", "2", lifeline}
            assert os.readlink(f"/proc/{pid}/fd/2") == "/dev/null"
            assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.set_inheritable(True)
        with_pool(work)


def test_what_decodes_for_nobody_is_ended_by_the_kernel(slow: Path) -> None:
    async def main() -> None:
        decoder, name = _Decoder(), os.fsencode(slow)
        decoder.wait()
        kind, _ = await decoder.ask(wire.REQUEST.pack(8, 0, len(name)) + name, 3 * 8**2)
        assert kind == wire.LARGE
        request = asyncio.create_task(decoder.ask(wire.GO, 3 * 8**2))
        await until_decoding()
        request.cancel()
        await asyncio.wait([request])
        decoder.hang_up()
        assert decoder.reap() == -signal.SIGIO

    asyncio.run(main())


def test_what_comes_on_the_connection_ends_no_decoding(slow: Path) -> None:
    """The kernel may tell of a request only after the request has been read and its decoding has begun."""

    async def work(pool: Pool) -> None:
        request = asyncio.create_task(pool.pixels(slow, 384))
        pid = await until_decoding()
        assert [fd for fd in ("0", lifeline_of(pid)) if tells_of_itself(pid, fd)] == [lifeline_of(pid)]
        request.cancel()
        await asyncio.wait([request])

    with_pool(work)


def lifeline_of(pid: int) -> str:
    """The number of a decoding process's lifeline, its last argument."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-2].decode()


def tells_of_itself(pid: int, fd: str) -> bool:
    """Whether the kernel sends a signal when something happens on an open file."""
    flags = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().partition("flags:")[2].split()[0]
    return bool(int(flags, 8) & os.O_ASYNC)


def test_large_pictures_share_room_in_their_order() -> None:
    async def main() -> None:
        room, inside = _Room(), []

        async def stay(name: str, needed: int, leave: asyncio.Event) -> None:
            async with room.of(needed):
                inside.append(name)
                await leave.wait()
            inside.remove(name)

        leave = [asyncio.Event() for _ in range(4)]
        needs = [LARGE_TOTAL // 2, LARGE_TOTAL, LARGE_TOTAL // 4, LARGE_TOTAL // 4]
        staying = [asyncio.create_task(stay(str(i), needs[i], leave[i])) for i in range(4)]

        async def settle() -> list[str]:
            for _ in range(20):
                await asyncio.sleep(0)
            return sorted(inside)

        assert await settle() == ["0"]
        leave[0].set()
        assert await settle() == ["1"]
        staying[1].cancel()
        inside.remove("1")
        assert await settle() == ["2", "3"]
        leave[2].set()
        leave[3].set()
        await asyncio.gather(*staying, return_exceptions=True)

    asyncio.run(main())


def test_it_needs_no_shared_memory_and_nothing_to_write_to() -> None:
    hide = "mount -o remount,bind,ro / && mount -t tmpfs -o ro none /dev/shm && ! touch x && exec "
    command = f"{sys.executable} -m tests.programs.decode examples/pair.jpg"
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", hide + command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    if "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert (done.returncode, done.stdout) == (0, "192\n"), done.stderr
