"""The work of the predictor: its setup, and one request from its inputs to its output."""

import asyncio
import gc
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from blip.batcher import Batcher, Result
from blip.config import Settings
from blip.errors import InputError
from blip.pictures.pool import Pool
from blip.weights.bundle import open_bundle

if TYPE_CHECKING:  # these import torch, which happens while the bundle is verified
    from blip.tasks import Found, Outputs, Sample, Task

DYING_SECONDS = 1.0  # for waiting predictions to report their error before the process ends


#: What runs, by name, and the bytes of the GPU's memory that are in use, if there is one.
Facts = tuple[dict[str, str], int | None]


@dataclass(frozen=True)
class Request:
    """The inputs of one prediction, as predict() takes them."""

    image: Path
    task: str
    question: str | None = None
    caption: str | None = None


class Service:
    """The loaded tasks, the processes that decode pictures for them, and the batching thread that runs them."""

    def __init__(
        self,
        tasks: "Mapping[str, Task]",
        pictures: Pool,
        max_batch: int,
        check_device: Callable[[], None] = lambda: None,
        facts: Callable[[], Facts] = lambda: ({}, None),
    ) -> None:
        self.tasks = tasks
        self.pictures = pictures
        self.facts = facts
        self._max_batch = max_batch
        self._preparing = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "preparing")
        self._batcher = Batcher(self.run_batch, max_batch, check_device, _end_process)

    def run_batch(self, task: str, samples: "Sequence[Sample]") -> "Outputs":
        """What is found for every sample, or its error; runs in the batching thread."""
        return self.tasks[task].run(samples)

    def close(self) -> None:
        """End the threads and the processes; what waits for the device gets a `BatcherError`."""
        self._batcher.close()
        self._preparing.shutdown(wait=False)
        self.pictures.close()

    def is_alive(self) -> bool:
        """Whether requests can still be run."""
        return self._batcher.is_alive()

    def try_out(self) -> None:
        """Make real predictions of each task, and see that pictures can be decoded."""
        self.pictures.wait()
        for name, task in self.tasks.items():
            for size in task.sizes(self._max_batch):
                for future in self._batcher.submit_together(name, [task.example()] * size):
                    task.say(future.result().value)

    async def run(self, request: Request, emit: "Callable[[Found], None] | None" = None) -> Result:
        """`find`, with the output string for its value."""
        result = await self.find(request, emit)
        # The batching thread makes no strings: the device would wait for them.
        loop = asyncio.get_running_loop()
        value = await loop.run_in_executor(self._preparing, self.tasks[request.task].say, result.value)
        return replace(result, value=value)

    async def find(self, request: Request, emit: "Callable[[Found], None] | None" = None) -> Result:
        """Run a request and return what is found; `emit` gets what is certain as it grows, in the batching thread.

        Raises:
            InputError: the image cannot be used, the text that the task needs is missing or blank, or the weights have
                no model for the task.
        """
        task = self._task(request.task)
        text: str = getattr(request, task.text_input) or "" if task.text_input else ""
        if task.text_input and not text.strip():
            raise InputError(f"{task.text_input} is required for {request.task}")
        began = time.perf_counter()
        pixels = await self.pictures.pixels(request.image, task.model.image_size, task.model.library)
        decode_time = time.perf_counter() - began
        loop = asyncio.get_running_loop()
        sample = await loop.run_in_executor(self._preparing, task.prepare, pixels, text, emit)
        result = await asyncio.wrap_future(self._batcher.submit(request.task, sample))
        return replace(result, decode_time=decode_time)

    def _task(self, name: str) -> "Task":
        if name not in self.tasks:
            known = " or ".join(self.tasks)
            raise InputError(f"task {name} is not possible: this server's weights are for {known} only; ask for that.")
        return self.tasks[name]

    async def stream(self, request: Request) -> AsyncIterator[str | Result]:
        """Yield the output's words as they become certain, then the whole result; raise the errors of `run`."""
        loop = asyncio.get_running_loop()
        certain: asyncio.Queue[Found | None] = asyncio.Queue()

        def emit(found: "Found") -> None:
            loop.call_soon_threadsafe(certain.put_nowait, found)

        running = asyncio.create_task(self.run(request, emit))
        running.add_done_callback(lambda _: certain.put_nowait(None))
        told = 0  # characters; a batch that is run again after an error starts from the beginning
        try:
            while (found := await certain.get()) is not None:
                output = await loop.run_in_executor(self._preparing, self.tasks[request.task].say, found)
                for word in _words(output[told:]):
                    yield word
                told = max(told, len(output))
            result = await running
            for word in _words(result.value[told:]):
                yield word
            yield result
        finally:
            running.cancel()


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+$", text)


def start(settings: Settings) -> Service:
    """Load the weights bundle, verify it at the same time, and try out every task.

    Raises:
        UserError: a setting or the bundle cannot be used, or the device does not support the precision.
    """
    pictures = Pool()  # its processes start while the weights are loaded
    try:
        service = _load(settings, pictures)
        service.try_out()
        gc.collect()
        gc.freeze()  # looking through all of torch takes 300 ms each time, and everyone waits
    except BaseException:
        pictures.close()
        raise
    return service


def _load(settings: Settings, pictures: Pool) -> Service:
    """The service with the tasks on their models."""
    path = settings.bundle_path()
    device = None
    if settings.weights == "pretrained" and not path.exists():
        from blip.device import choose_device, default_dtype
        from blip.weights.pretrained import ensure

        device = choose_device(settings.device)
        ensure(path, default_dtype(device), lambda line: print(line, flush=True))
    bundle = open_bundle(path)
    with ThreadPoolExecutor(1) as verifier:
        verified = verifier.submit(bundle.verify)  # while torch and LAVIS are imported and the weights are read
        from blip.about import about
        from blip.device import check_device, choose_device, default_dtype, describe, used_memory
        from blip.tasks import TASKS
        from blip.weights.load import load_models

        chosen = device or choose_device(settings.device)
        dtype = settings.dtype or default_dtype(chosen)
        print("; ".join(f"{name} {value}" for name, value in about(chosen).items()))
        print(f"Weights: {bundle.name} ({bundle.dtype}) from {bundle.path}, computing in {dtype}. {bundle.note}")
        models = load_models(
            bundle,
            chosen,
            dtype,
            max_batch=settings.max_batch,
            cuda_graphs=settings.cuda_graphs,
            pinned=settings.kernels,
        )
        verified.result()
    tasks = {task.name: task(models[task.bundle_name]) for task in TASKS if task.bundle_name in models}
    facts = {"weights": bundle.name, "dtype": dtype, "device": describe(chosen), "torch": version("torch")}
    return Service(
        tasks,
        pictures,
        settings.max_batch,
        check_device=lambda: check_device(chosen),
        facts=lambda: (facts, used_memory(chosen)),
    )


def _end_process() -> None:
    """End this process soon; the server ends with it."""
    threading.Timer(DYING_SECONDS, os._exit, [1]).start()
