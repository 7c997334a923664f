"""A GPU: how right, how fast and how large our engine is on it, beside LAVIS and Hugging Face's BLIP.

    scripts/bench gpu [--scenes N] [--pictures N] [--no-http] [--dry-run-on-cpu]

Weights are the demo's for outputs on drawn scenes, and random ones of full size for all else; captions have 20 tokens,
answers 4. "different" is the share of outputs that are not those of LAVIS in float32 on the CPU; for a match, of
decisions. No part begins after eight minutes, and a part that fails costs no other. Prints a table and a line of JSON,
and keeps the line under benchmarks/results, after each part as far as it is.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.coldstart import profile
from benchmarks.harness import DEADLINE, MIB, ROOT, START, Server
from benchmarks.hf_environment import MissingError, hf_python
from benchmarks.latency import precisions
from benchmarks.machine import machine
from benchmarks.outcome import finish, head, keep
from benchmarks.random_blip import normalised, random_pixels
from benchmarks.random_bundle import write_bundle
from benchmarks.scenes import Scenes, disagreement, lavis_results, load_exact, run, run_lavis
from benchmarks.throughput import INPUTS, WORKLOADS, measure
from blip.batcher import Batcher
from blip.device import check_device
from blip.engine.encoders import encode_image
from blip.engine.graphs import bucket_sizes
from blip.engine.model import Model
from blip.tasks import TASKS, Outputs, Sample, Task
from blip.weights.bundle import Bundle, open_bundle
from blip.weights.load import load_models

TEXT = "what colour is the dog left of the circle?"
SECONDS = 6.0  # of each load by HTTP
CLIENTS = 64
TOTAL = 480.0  # seconds, in which each part begins; Hugging Face's BLIP ends in them as well


class Bench:
    """The figures so far, and what they are taken on."""

    def __init__(self, device: torch.device, small: bool) -> None:
        self.device = device
        self.small = small
        self.largest = 4 if small else 64
        self.figures: dict[str, Any] = {}
        self._end = time.monotonic() + (START if small else TOTAL)

    @property
    def left(self) -> float:
        """Seconds of the total."""
        return max(0.0, self._end - time.monotonic())

    def attempt(self, name: str, part: Callable[[], None]) -> None:
        """Do a part, if there is time; what it fails of is noted."""
        if not self.left:
            self.note(f"{name}: left out", "no time was left")
            return
        try:
            part()
        except Exception as error:
            self.note(f"{name}: came no further", f"{type(error).__name__}: {error}".partition("\n")[0])
        release()

    def note(self, name: str, value: Any, unit: str = "") -> None:
        """Keep a figure and print it."""
        self.figures[f"{name} [{unit}]" if unit else name] = value
        print(f"{name:64} {value} {unit}".rstrip(), flush=True)

    def milliseconds(self, work: Callable[[], Any], repeats: int = 9) -> float:
        """The median of `repeats`, after three that do not count; the device is waited for."""
        times = []
        for _ in range(3 + repeats):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            times.append((time.perf_counter() - begin) * 1e3)
        return round(statistics.median(times[3:]), 2)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> int:
        """MiB of the card in use, by everybody."""
        if self.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info()
        return (total - free) // MIB

    def load(self, bundle: Bundle, dtype: str, max_batch: int, *, graphs: bool = True) -> dict[str, Model]:
        """The models; on a CPU their works are done eagerly."""
        models = load_models(bundle, self.device, dtype, max_batch=max_batch, cuda_graphs=graphs)
        if graphs and self.device.type != "cuda":
            models = {task: model.with_graphs(max_batch, lambda work: work) for task, model in models.items()}
        return models


def main(argv: Sequence[str]) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="scripts/bench gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scenes", type=int, default=200, help="drawn scenes to compare outputs on (default 200)")
    parser.add_argument("--pictures", type=int, default=16, help="random ones to compare outputs on (default 16)")
    parser.add_argument("--no-http", action="store_true", help="leave the load by HTTP out")
    parser.add_argument("--dry-run-on-cpu", "--quick", action="store_true", help="small models on the CPU: a trial")
    options = parser.parse_args(argv)
    dry = options.dry_run_on_cpu
    if not dry and not torch.cuda.is_available():
        print("scripts/bench gpu: torch sees no GPU on this machine; try it with --dry-run-on-cpu.", file=sys.stderr)
        return 2
    bench = Bench(torch.device("cpu" if dry else "cuda"), dry)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        write_bundle(path, small=dry)
        bundle = open_bundle(path)
        dtypes = ["float32"] if dry else precisions(bench.device)
        default = "float32" if dry else "float16"
        parts = {
            # First, because our own arithmetic is set for the whole process.
            "LAVIS on the same device": partial(peers, bench, bundle),
            "speed": partial(speed, bench, bundle, default),
            "start": partial(start, bench, path, default),
            "HTTP": partial(http, bench, path, default),
            "drawn scenes": partial(compare_scenes, bench, 8 if dry else options.scenes, dtypes),
            "failures": partial(failures, bench, bundle),
            "random pictures": partial(compare_random, bench, bundle, options.pictures, dtypes),
            "Hugging Face's BLIP": partial(hugging_face, bench),
        }
        if options.no_http:
            del parts["HTTP"]
        about = {
            **head("gpu", quick=dry),
            **machine(bench.device.type),
            "driver": driver(),
            "torch": torch.__version__,
            "figures": bench.figures,
        }
        name = f"gpu-{about.get('gpu', 'none').replace(' ', '-')}-{about['time'][:10]}"
        for part, work in parts.items():
            bench.attempt(part, work)
            if not dry:
                keep(about, name)
    print(f"\non {about['cpu']}, {about['cores']} cores, {about.get('gpu', 'no GPU')}")
    finish(about, None)  # it is kept
    return 0


def compare_scenes(bench: Bench, count: int, dtypes: Sequence[str]) -> None:
    """The demo weights on drawn scenes."""
    for dtype, rates in disagreement(count, bench.device, dtypes).items():
        for task in ("caption", "answer", "match"):
            bench.note(f"demo, {count} scenes, {dtype}, {task}: different", f"{rates[task]:.1%}")
        bench.note(f"demo, {count} scenes, {dtype}: probability off by at most", f"{rates['largest_difference']:.1e}")


def compare_random(bench: Bench, bundle: Bundle, count: int, dtypes: Sequence[str]) -> None:
    """Random weights on random pictures, whose nearly equal scores are the hardest case."""
    exact = load_exact(bundle, torch.device("cpu"))
    pictures = {task: random_scenes(count, model.image_size) for task, model in exact.items()}
    expected = {task: lavis_results(exact, task, scenes) for task, scenes in pictures.items()}
    del exact
    for dtype in dtypes:
        models = bench.load(bundle, dtype, count)
        for task, model in models.items():
            pixels, texts = pictures[task].pixels.to(bench.device), pictures[task].texts
            whole = run(task, model, pixels, texts, model.graphs)
            plain = run(task, model, pixels, texts, None)
            alone = [run(task, model, pixels[i : i + 1], texts[i : i + 1], model.graphs)[0] for i in range(len(pixels))]
            name = f"random, {len(pixels)} pictures, {dtype}, {task}"
            bench.note(f"{name}: different", different(task, whole, expected[task]))
            bench.note(f"{name}: with graphs against without", different(task, whole, plain))
            bench.note(f"{name}: alone against in a batch", different(task, alone, whole))
        del models, model
        release()


def random_scenes(count: int, size: int) -> Scenes:
    """Noise, and one text for all."""
    return Scenes(random_pixels(count, 1, size), [TEXT] * count, [TEXT] * count)


def different(task: str, ours: Sequence[Any], theirs: Sequence[Any]) -> str:
    """The share of results that differ; for a match, of decisions, and how far a probability is off at most."""
    pairs = list(zip(ours, theirs, strict=True))
    if task != "match":
        return f"{sum(a != b for a, b in pairs) / len(pairs):.1%}"
    decisions = sum((a[0] > 0.5) != (b[0] > 0.5) for a, b in pairs) / len(pairs)
    return f"{decisions:.1%} (by {max(abs(a[0] - b[0]) for a, b in pairs):.1e})"


def peers(bench: Bench, bundle: Bundle) -> None:
    """LAVIS on the same device, one picture at a time, in float32 with torch's settings and in half precision."""
    for dtype in (torch.float32,) if bench.small else (torch.float32, torch.float16):
        models = load_exact(bundle, bench.device)
        for task, model in models.items():
            model.net.to(dtype)
            pixels = normalised(random_pixels(1, 1, model.image_size)).to(bench.device, dtype)
            name = f"LAVIS, {str(dtype)[6:]}, {task} alone"
            work = partial(run_lavis, task, model, pixels, [TEXT])
            bench.note(name, bench.milliseconds(work, 3), "ms")
        del models, model, work
        release()


def hugging_face(bench: Bench) -> None:
    """Hugging Face's BLIP on the same device, as far as it comes in the time that is left."""
    try:
        python = hf_python(bench.left, make=not bench.small)
    except MissingError as reason:
        bench.note("Hugging Face's BLIP is left out", str(reason))
        return
    small = ["--small"] if bench.small else []
    command: list[str | Path] = [python, "-W", "ignore", "-m", "benchmarks.hf_gpu", *small]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # In a session of its own: compiling has processes of its own, which end with it.
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        patience = threading.Timer(bench.left, os.killpg, [process.pid, signal.SIGKILL])
        patience.start()
        try:
            assert process.stdout is not None
            for line in filter(None, map(figure_of, process.stdout)):
                name = f"Hugging Face, {line['dtype']}{', compiled' if line['compiled'] else ''}, {line['task']}"
                bench.note(f"{name}, batch {line['batch']}", line["ms"], "ms")
        finally:
            patience.cancel()
    if process.returncode != 0:
        bench.note("Hugging Face's BLIP came no further", f"status {process.returncode}")


def figure_of(line: str) -> dict[str, Any] | None:
    """The figure that a line of `benchmarks.hf_gpu` tells; None for one that a library printed."""
    found: dict[str, Any] | None = json.loads(line) if line.startswith("{") else None
    return found


def speed(bench: Bench, bundle: Bundle, dtype: str) -> None:
    """Start, memory, latency and throughput, as served."""
    before, begin = bench.memory(), time.perf_counter()
    models = bench.load(bundle, dtype, 16)
    bench.wait()
    bench.note(
        "models loaded, graphs captured and proven, to batches of 16", round(time.perf_counter() - begin, 2), "s"
    )
    bench.note("card in use before", before, "MiB")
    bench.note("card in use with all three models", bench.memory(), "MiB")
    del models
    release()
    models = bench.load(bundle, dtype, bench.largest)
    tasks = {task.name: task(models[task.bundle_name]) for task in TASKS}
    requests = {name: prepared(task, bench.largest) for name, task in tasks.items()}
    for name, task in tasks.items():
        samples = requests[name]
        bench.note(f"ours, {dtype}, {name} alone", bench.milliseconds(partial(alone, task, samples[0])), "ms")
        for batch in bucket_sizes(bench.largest):
            figure = f"ours, {dtype}, {name} in batches of {batch}"
            with noting_lack_of_memory(bench, figure):
                ms = bench.milliseconds(partial(task.run, samples[:batch]), 5)
                bench.note(figure, round(batch / ms * 1e3, 1), "per s")
    for batch in bucket_sizes(bench.largest):
        mixed(bench, tasks, requests, batch)
    roofline(bench, models)
    bench.note(f"card in use after batches of {bench.largest}", bench.memory(), "MiB")


def prepared(task: Task, count: int) -> list[Sample]:
    """Samples of pictures of noise."""
    size = task.model.image_size
    pictures = [bytearray(Image.effect_noise((size, size), sigma).convert("RGB").tobytes()) for sigma in range(8)]
    return [task.prepare(pictures[i % len(pictures)], TEXT) for i in range(count)]


def alone(task: Task, sample: Sample) -> str:
    """One request to its output string."""
    (found,) = task.run([sample])
    return task.say(found)


@contextmanager
def noting_lack_of_memory(bench: Bench, name: str) -> Iterator[None]:
    """What a card is too small for costs no other figure."""
    try:
        yield
    except torch.OutOfMemoryError:
        bench.note(name, "no memory")


def mixed(bench: Bench, tasks: dict[str, Task], requests: dict[str, list[Sample]], batch: int) -> None:
    """All tasks at once through the batcher, one request of each after the other."""
    samples = [one for together in zip(*requests.values(), strict=True) for one in zip(requests, together, strict=True)]
    rates = []
    with closing(Batcher(lambda name, samples: tasks[name].run(samples), batch)) as batcher:
        for _ in range(4):
            begin = time.perf_counter()
            futures = [batcher.submit(name, sample) for name, sample in samples]
            for future in futures:
                future.result(DEADLINE)
            rates.append(len(samples) / (time.perf_counter() - begin))
    bench.note(
        f"ours, mixed tasks through the batcher, batches of up to {batch}",
        round(statistics.median(rates[1:]), 1),
        "per s",
    )


@torch.inference_mode()
def roofline(bench: Bench, models: dict[str, Model]) -> None:
    """The image encoder's arithmetic beside that of one large matrix product."""
    side = 512 if bench.small else 8192
    vit = models["caption"].net.visual_encoder
    x, y = (torch.randn(side, side, device=bench.device, dtype=vit.pos_embed.dtype) for _ in range(2))
    peak = 2 * side**3 / bench.milliseconds(lambda: x @ y) / 1e9
    tokens, width = vit.pos_embed.shape[1:]
    layer = 24 * tokens * width**2 + 4 * tokens**2 * width  # operations of the products and of attention
    pixels = torch.randn(bench.largest, 3, *vit.patch_embed.img_size, device=bench.device)
    rate = bench.largest * len(vit.blocks) * layer / bench.milliseconds(lambda: encode_image(vit, pixels)) / 1e9
    bench.note("one matrix product", round(peak, 1), "TFLOP/s")
    bench.note(f"image encoder, batch {bench.largest}", f"{rate:.1f} TFLOP/s, {rate / peak:.0%} of it")


def failures(bench: Bench, bundle: Bundle) -> None:
    """Too little memory for a batch, and an error after which the device does nothing more.

    In float32, where an answer is the same in a batch of any size, and without graphs, which have their memory already.
    """
    models = bench.load(bundle, "float32", 16, graphs=False)
    (task,) = [task(models["answer"]) for task in TASKS if task.bundle_name == "answer"]
    samples = prepared(task, 16)
    expected = task.run(samples)
    batching = closing(Batcher(partial(run_task, task), 16, partial(check_device, bench.device)))
    with little_memory(bench, partial(task.run, samples[:4])), batching as batcher:
        found = [future.result(DEADLINE) for future in batcher.submit_together("answer", samples)]
    same = sum(one.value == other for one, other in zip(found, expected, strict=True))
    bench.note("memory for four: answers of sixteen that come, and are the same", same)
    bench.note("memory for four: batches", sorted({one.batch_size for one in found}))
    del models, task, batcher, batching
    release()
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_error", bench.device.type],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    bench.note("an error that spoils the device", (ended.stdout.strip().splitlines() or ["no answer"])[-1])


def run_task(task: Task, _: str, samples: Sequence[Sample]) -> Outputs:
    """What the batcher calls."""
    return task.run(samples)


@contextmanager
def little_memory(bench: Bench, fits: Callable[[], Any]) -> Iterator[None]:
    """Leave room for what `fits` needs, and little more."""
    if bench.device.type != "cuda":
        yield
        return
    release()
    base = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    fits()
    need = torch.cuda.max_memory_reserved() - base
    release()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((base + need * 5 / 4) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def start(bench: Bench, path: Path, dtype: str) -> None:
    """The server with batches as by default: start to READY and memory; then the stages of its setup."""
    before, begin = bench.memory(), time.perf_counter()
    with serving(bench, path, dtype):
        bench.note("start to READY", round(time.perf_counter() - begin, 1), "s")
        bench.note("card in use by the server, its context included", bench.memory() - before, "MiB")
    for stage, seconds in profile(path, bench.device.type).items():
        bench.note(f"setup without the server: {stage}", seconds, "s")


@contextmanager
def serving(bench: Bench, path: Path, dtype: str, **settings: str) -> Iterator[Server]:
    """The server with these weights, READY."""
    environment = {"BLIP_DEVICE": bench.device.type, "BLIP_WEIGHTS": str(path), "BLIP_DTYPE": dtype, **settings}
    with Server({**environment, "COG_LOG_LEVEL": "error"}) as server:
        server.wait_for("READY", START)
        yield server


def http(bench: Bench, path: Path, dtype: str) -> None:
    """Clients that ask the server one request after another."""
    with serving(bench, path, dtype, BLIP_MAX_BATCH=str(bench.largest), COG_MAX_CONCURRENCY=str(CLIENTS)) as server:
        for workload, kinds in {**{kind: (kind,) for kind in INPUTS}, **WORKLOADS}.items():
            cell = measure(server.url, kinds, CLIENTS, 1.0 if bench.small else SECONDS)
            bench.note(f"{CLIENTS} clients over HTTP, {workload}", round(cell.rate, 1), "per s")
            bench.note(f"{CLIENTS} clients over HTTP, {workload}: largest batch", max(cell.batches, default=0))
            bench.note(f"{CLIENTS} clients over HTTP, {workload}: lost", dict(cell.lost))


def release() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def driver() -> str | None:
    """The version of NVIDIA's driver."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
