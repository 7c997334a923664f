"""A GPU: how right, how fast and how large our engine is on it, beside LAVIS and Hugging Face's BLIP.

    scripts/bench gpu [--scenes N] [--pictures N] [--no-http] [--dry-run-on-cpu]

Weights are the demo's for outputs on drawn scenes, and random ones of full size for all else; captions have 20 tokens,
answers 4. "different" is the share of outputs that are not those of LAVIS in float32 on the CPU; for a match, of
decisions. It takes up to eight minutes. Prints a table and a line of JSON, and keeps the line under benchmarks/results.
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
from contextlib import contextmanager
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
from benchmarks.outcome import finish, head
from benchmarks.random_blip import normalised, random_pixels
from benchmarks.random_bundle import write_bundle
from benchmarks.scenes import Scenes, disagreement, lavis_results, load_exact, run, run_lavis
from benchmarks.throughput import WORKLOADS, measure
from blip.batcher import Batcher
from blip.device import check_device
from blip.engine.encoders import encode_image
from blip.engine.graphs import bucket_sizes
from blip.engine.model import Model
from blip.tasks import TASKS, Outputs, Sample, Task
from blip.weights.bundle import Bundle, open_bundle
from blip.weights.load import load_models

TEXT = "what colour is the dog left of the circle?"
SECONDS = 10.0  # of load by HTTP
CLIENTS = 64
PATIENCE = 150.0  # seconds for Hugging Face's BLIP, and for each step of making its environment


class Bench:
    """The figures so far, and what they are taken on."""

    def __init__(self, device: torch.device, small: bool) -> None:
        self.device = device
        self.small = small
        self.largest = 4 if small else 64
        self.figures: dict[str, Any] = {}

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
        compare_scenes(bench, 8 if dry else options.scenes, dtypes)
        compare_random(bench, bundle, options.pictures, dtypes)
        default = "float32" if dry else "float16"
        peers(bench, bundle)
        hugging_face(bench)
        speed(bench, bundle, default)
        failures(bench, bundle, default)
        start(bench, path, default)
        if not options.no_http:
            http(bench, path, default)
    result = {
        **head("gpu", quick=dry),
        **machine(bench.device.type),
        "driver": driver(),
        "torch": torch.__version__,
        "figures": bench.figures,
    }
    print(f"\non {result['cpu']}, {result['cores']} cores, {result.get('gpu', 'no GPU')}")
    finish(result, None if dry else f"gpu-{result['gpu'].replace(' ', '-')}-{result['time'][:10]}")
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
    """LAVIS on the same device, one picture at a time, in float32 as it is and in half precision."""
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
    """Hugging Face's BLIP on the same device, as far as it comes in its time."""
    try:
        python = hf_python(PATIENCE, make=not bench.small)
    except MissingError as reason:
        bench.note("Hugging Face's BLIP is left out", str(reason))
        return
    process = subprocess.Popen(
        [python, "-W", "ignore", "-m", "benchmarks.hf_gpu", *(["--small"] if bench.small else [])],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # compiling has processes of its own, which end with it
    )
    patience = threading.Timer(PATIENCE, os.killpg, [process.pid, signal.SIGKILL])
    patience.start()
    assert process.stdout is not None
    for line in process.stdout:
        found = json.loads(line)
        name = f"Hugging Face, {found['dtype']}{', compiled' if found['compiled'] else ''}, {found['task']}"
        bench.note(f"{name}, batch {found['batch']}", found["ms"], "ms")
    patience.cancel()
    if process.wait() != 0:
        bench.note("Hugging Face's BLIP came no further", f"status {process.returncode}")


def speed(bench: Bench, bundle: Bundle, dtype: str) -> None:
    """Start, memory, latency and throughput, as served."""
    before, begin = bench.memory(), time.perf_counter()
    models = bench.load(bundle, dtype, 16)
    bench.wait()
    bench.note(
        "models loaded, graphs captured and proven, to batches of 16", round(time.perf_counter() - begin, 2), "s"
    )
    bench.note("card in use before", before, "MiB")
    bench.note("card in use by all three models", bench.memory(), "MiB")
    del models
    release()
    models = bench.load(bundle, dtype, bench.largest)
    tasks = {task.name: task(models[task.bundle_name]) for task in TASKS}
    for name, task in tasks.items():
        samples = prepared(task, bench.largest)
        bench.note(f"ours, {dtype}, {name} alone", bench.milliseconds(partial(alone, task, samples[0])), "ms")
        for batch in bucket_sizes(bench.largest):
            ms = bench.milliseconds(partial(task.run, samples[:batch]), 5)
            bench.note(f"ours, {dtype}, {name} in batches of {batch}", round(batch / ms * 1e3, 1), "per s")
    mixed(bench, tasks)
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


def mixed(bench: Bench, tasks: dict[str, Task]) -> None:
    """All tasks at once through the batcher."""
    batcher = Batcher(lambda name, samples: tasks[name].run(samples), bench.largest)
    samples = [(name, sample) for name, task in tasks.items() for sample in prepared(task, bench.largest)]
    rates = []
    for _ in range(4):
        begin = time.perf_counter()
        futures = [batcher.submit(name, sample) for name, sample in samples]
        for future in futures:
            future.result(DEADLINE)
        rates.append(len(samples) / (time.perf_counter() - begin))
    bench.note("ours, mixed tasks through the batcher", round(statistics.median(rates[1:]), 1), "per s")


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


def failures(bench: Bench, bundle: Bundle, dtype: str) -> None:
    """Too little memory for a batch, and an error after which the device does nothing more."""
    models = bench.load(bundle, dtype, 16, graphs=False)
    (task,) = [task(models["answer"]) for task in TASKS if task.bundle_name == "answer"]
    samples = prepared(task, 16)
    expected = task.run(samples)
    with little_memory(bench, partial(task.run, samples[:4])):
        batcher = Batcher(partial(run_task, task), 16, partial(check_device, bench.device))
        found = [future.result(DEADLINE) for future in batcher.submit_together("answer", samples)]
    same = sum(one.value == other for one, other in zip(found, expected, strict=True))
    bench.note("memory for four: answers of sixteen that come, and are the same", same)
    bench.note("memory for four: batches", sorted({one.batch_size for one in found}))
    del models, task, batcher
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


def start(bench: Bench, bundle: Path, dtype: str) -> None:
    """The server with batches as by default: start to READY and memory; then the stages of its setup."""
    before, begin = bench.memory(), time.perf_counter()
    with serving(bench, bundle, dtype):
        bench.note("start to READY", round(time.perf_counter() - begin, 1), "s")
        bench.note("card in use by the server, its context included", bench.memory() - before, "MiB")
    for stage, seconds in profile(bundle, bench.device.type).items():
        bench.note(f"setup without the server: {stage}", seconds, "s")


@contextmanager
def serving(bench: Bench, bundle: Path, dtype: str, **settings: str) -> Iterator[Server]:
    """The server with these weights, READY."""
    environment = {"BLIP_DEVICE": bench.device.type, "BLIP_WEIGHTS": str(bundle), "BLIP_DTYPE": dtype, **settings}
    with Server({**environment, "COG_LOG_LEVEL": "error"}) as server:
        server.wait_for("READY", START)
        yield server


def http(bench: Bench, bundle: Path, dtype: str) -> None:
    """Clients that ask the server one request after another."""
    with serving(bench, bundle, dtype, BLIP_MAX_BATCH=str(bench.largest), COG_MAX_CONCURRENCY=str(CLIENTS)) as server:
        for workload, kinds in WORKLOADS.items():
            cell = measure(server.url, kinds, CLIENTS, 1.0 if bench.small else SECONDS)
            bench.note(f"{CLIENTS} clients over HTTP, {workload}", round(cell.rate, 1), "per s")
            bench.note(f"{CLIENTS} clients over HTTP, {workload}: largest batch", max(cell.batches))
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
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
