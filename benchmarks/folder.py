"""Pictures captioned per second in a folder: by our engine alone, by our program in two ways, by Hugging Face's BLIP.

    scripts/bench folder [--pictures N] [--rounds N] [--quick]

The pictures are JPEGs of a photo's size, the weights full-size and random, a caption has 20 tokens. "in process" is
`python -m blip caption` as users run it, with a text file beside each picture; "HTTP" is the same with a server on this
machine. Loading is not counted: the seconds of both are those that the program says at its end, from when all is loaded
to the last text file. The difference of a long and a short run would have the noise of two loads in it, and the time
from the first text file to the last would leave out the first batch, for which the device waits. They are rounded to a
tenth; so a fast device needs more pictures. "of the engine" is a rate beside that of the engine alone, "different" the
share of captions that are not the engine's, "peak" the memory of the process that computes, loading included. The ways
take turns, so that whatever else the machine does falls on all. What a way needs is started for its turn and ended
after it: a program computes slower beside another that has gigabytes, also where that one is idle. Prints a table and a
line of JSON, and keeps the line under benchmarks/results.
"""

import argparse
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.folder_peers import BATCH, TASK
from benchmarks.harness import MIB, ROOT, START, Server
from benchmarks.hf_environment import MissingError, hf_python
from benchmarks.latency import versions
from benchmarks.machine import machine
from benchmarks.outcome import finish, head, share_different
from benchmarks.pictures import noise
from benchmarks.processes import peak_memory
from benchmarks.random_bundle import write_bundle
from benchmarks.responder import Responder
from blip.config import DEMO, Settings
from blip.folder.questions import Question
from blip.weights.bundle import open_bundle
from demo import scenes

SIZE = (1600, 1200)
TEXTURE = 0.3  # share of noise in a picture, with which its file is as large as a photo's
FEW = 2 * BATCH  # pictures that every way is tried on before, and all that Hugging Face's BLIP gets
QUICK_PICTURES = 20  # more than a batch
LEAST = 0.05  # seconds; the program says 0.0 for less
ENGINE = "engine alone"
HUGGING_FACE = f"Hugging Face, batch {BATCH}"


@dataclass(frozen=True)
class Turn:
    """What one way did with the folder once.

    Attributes:
        seconds: taken, without loading.
        captions: by the order of the pictures.
        peak: the most memory of the process that computes so far, in bytes.
    """

    seconds: float
    captions: list[str]
    peak: int

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return len(self.captions) / self.seconds


Way = Callable[[Path], Turn]
#: Starts what a way needs; it ends with the `with` block.
Start = Callable[[], AbstractContextManager[Way]]


def main(argv: Sequence[str]) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="scripts/bench folder", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pictures", type=int, default=64, help="in the folder (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (default 3)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the demo's weights, few pictures, one round, a small model of Hugging Face's: a trial, no result",
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.pictures, options.rounds = QUICK_PICTURES, 1

    device = "cuda" if torch.cuda.is_available() else "cpu"
    python = interpreter(options.quick)
    with tempfile.TemporaryDirectory() as name:
        folder, few, bundle = Path(name) / "pictures", Path(name) / "few", Path(name) / "bundle"
        if options.quick:
            bundle = DEMO
        else:
            write_bundle(bundle)
            Path("/proc/self/clear_refs").write_text("5")  # the peak, which is passed on to processes it starts
        draw(folder, options.pictures)
        draw(few, FEW)
        ways = ways_of(bundle, device, python, small=options.quick)
        turns = take_turns(ways, few, folder, options.rounds)
    result = {
        **head("folder", quick=options.quick),
        **machine(device),
        "versions": {"ours": versions(Path(sys.executable)), **({"hf": versions(python)} if python else {})},
        "pictures": options.pictures,
        "rounds": options.rounds,
        "max_batch": Settings.from_environment().max_batch,
        "rows": [row(way, done, turns[ENGINE]) for way, done in turns.items()],
    }
    print_table(result["rows"])
    print(f"\non {result['cpu']}, {result['cores']} cores, {result.get('gpu', 'no GPU')}")
    finish(result, None if options.quick else f"folder-{device}")


def interpreter(quick: bool) -> Path | None:
    """The one that runs Hugging Face's BLIP; None where there is none. A trial takes the older one that ours has."""
    if quick:
        return Path(sys.executable)
    try:
        return hf_python()
    except MissingError as reason:
        print(f"Hugging Face's BLIP is left out: {reason}.")
        return None


def draw(folder: Path, count: int) -> None:
    """Fill a folder with drawn scenes, as large as photos and as hard to decode."""
    folder.mkdir()
    rng = random.Random(0)
    for number in range(count):
        scene = scenes.draw(scenes.random_scene(rng)).resize(SIZE, Image.Resampling.BICUBIC)
        Image.blend(scene, noise(SIZE), TEXTURE).save(folder / f"{number:05}.jpg", quality=90)


def ways_of(bundle: Path, device: str, python: Path | None, *, small: bool) -> dict[str, Start]:
    """How each is started."""
    environment = {"BLIP_WEIGHTS": str(bundle), "BLIP_DEVICE": device}

    @contextmanager
    def engine() -> Iterator[Way]:
        with Responder(Path(sys.executable), ["benchmarks.folder_peers", "engine"], environment) as running:
            yield partial(by_engine, running)

    @contextmanager
    def server() -> Iterator[Way]:
        with Server(environment) as running:
            running.wait_for("READY", START)
            yield partial(by_server, running)

    @contextmanager
    def hugging_face() -> Iterator[Way]:
        assert python is not None
        length = open_bundle(bundle).config("caption")["max_length"]
        command = ["benchmarks.folder_peers", "hf", str(bundle / "vocab.txt"), str(length)]
        with Responder(python, [*command, *(["--small"] if small else [])]) as running:
            yield partial(by_hugging_face, running)

    return {
        ENGINE: engine,
        "in process": lambda: nullcontext(partial(by_program, environment)),
        "HTTP": server,
        **({HUGGING_FACE: hugging_face} if python else {}),
    }


def by_engine(engine: Responder, folder: Path) -> Turn:
    """Our engine alone."""
    done = engine.ask(str(folder))
    question = Question(TASK)
    captions = [question.row(output)["caption"] for output in done["outputs"]]
    return Turn(done["seconds"], captions, peak_memory(engine.pid))


def by_hugging_face(peer: Responder, folder: Path) -> Turn:
    """Hugging Face's BLIP, whose random weights are not ours."""
    return Turn(peer.ask(str(folder))["seconds"], take_texts(folder), peak_memory(peer.pid))


def by_server(server: Server, folder: Path) -> Turn:
    """Our program, which asks a server."""
    done = by_program({}, folder, "--url", server.url)
    return Turn(done.seconds, done.captions, max(server.peak_memory()))


def by_program(environment: Mapping[str, str], folder: Path, *arguments: str) -> Turn:
    """Our program."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "blip", "caption", folder, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)  # Popen would not tell the usage
    process.returncode = os.waitstatus_to_exitcode(status)
    end = re.search(r"^(\d+) of \1, ([\d.]+) s, 0 failed$", said, re.MULTILINE)
    if process.returncode or not end:
        raise SystemExit(f"scripts/bench: the program did not caption all pictures:\n{said}")
    return Turn(max(float(end[2]), LEAST), take_texts(folder), usage.ru_maxrss * 1024)


def take_texts(folder: Path) -> list[str]:
    """The captions, by the order of their pictures; their files are removed, so that the next turn begins anew."""
    files = [picture.with_suffix(".txt") for picture in sorted(folder.glob("*.jpg"))]
    captions = [file.read_text(encoding="utf-8") for file in files]
    for file in files:
        file.unlink()
    return captions


def take_turns(ways: Mapping[str, Start], few: Path, folder: Path, rounds: int) -> dict[str, list[Turn]]:
    """Let every way do the folder, or the slow one few pictures, again and again; each has the machine to itself."""
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    for number in range(1, rounds + 1):
        for name, start in ways.items():
            with start() as way:
                way(few)
                turns[name].append(way(few if name == HUGGING_FACE else folder))
            print(f"round {number}, {name}: {turns[name][-1].rate:.3f} pictures/s", flush=True)
    return turns


def row(way: str, turns: Sequence[Turn], engine: Sequence[Turn]) -> dict[str, Any]:
    """What the line of JSON says of a way; `engine` are the engine's turns."""
    rate = statistics.median(turn.rate for turn in turns)
    found: dict[str, Any] = {
        "way": way,
        "pictures_per_s": round(rate, 3),
        "of_engine": round(rate / statistics.median(turn.rate for turn in engine), 3),
        "rates": [round(turn.rate, 3) for turn in turns],
        "peak_mib": round(max(turn.peak for turn in turns) / MIB),
    }
    if way != HUGGING_FACE:  # its random weights are not ours
        pairs = [pair for turn in turns for pair in zip(turn.captions, engine[0].captions, strict=True)]
        found["different"] = share_different(pairs)
    return found


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """A line for every way."""
    print(f"\n{'':24}{'pictures/s':>12}{'of the engine':>15}{'peak':>11}{'different':>15}")
    for row in rows:
        different = f"{row['different']:.1%}" if "different" in row else "other weights"
        speed = f"{row['pictures_per_s']:12.3f}{row['of_engine']:15.1%}"
        print(f"{row['way']:24}{speed}{row['peak_mib']:7} MiB{different:>15}")


if __name__ == "__main__":
    main(sys.argv[1:])
