"""The predictor that the Cog server loads: inputs, setup and routing; the work is in blip/."""

import asyncio
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Optional

from cog import AsyncConcatenateIterator, BasePredictor, ExperimentalFeatureWarning, Input, Path, current_scope

# blip/ is imported in setup(): the server's parent process reads this file only for its signatures.


class Predictor(BasePredictor):
    """Image captions, answers about an image, and image-text match scores from three BLIP models."""

    def setup(self) -> None:
        """Load the weights bundle, verify it meanwhile, and make one real prediction of each task."""
        from blip.bundle import open_bundle
        from blip.config import Settings

        settings = Settings.from_environment()
        path = settings.bundle_path()
        device = None
        if settings.weights == "pretrained" and not path.exists():
            from blip.models import choose_device
            from blip.pretrained import ensure

            device = choose_device(settings.device)
            stored = "float16" if device.type == "cuda" else "float32"
            ensure(path, stored, lambda line: print(line, flush=True))
        bundle = open_bundle(path)
        with ThreadPoolExecutor(1) as verifier:
            verified = verifier.submit(bundle.verify)  # while torch and LAVIS are imported and the weights are read
            from blip.batcher import Batcher
            from blip.models import choose_device, load_models
            from blip.tasks import Tasks

            device = device or choose_device(settings.device)
            dtype = settings.dtype or ("float16" if device.type == "cuda" else "float32")
            print(f"Weights: {bundle.name} ({bundle.dtype}) from {bundle.path}, computing in {dtype}. {bundle.note}")
            models = load_models(bundle, device, dtype, max_batch=settings.max_batch, cuda_graphs=settings.cuda_graphs)
            verified.result()
        self.tasks = Tasks(models)
        # A few at a time: a large picture takes half a gigabyte while it is decoded.
        self.decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "decoder")
        self.batcher = Batcher(self.tasks.run, settings.max_batch, self.tasks.check_device, end_worker)
        for task, sample in self.tasks.examples().items():
            self.batcher.submit(task, sample).result()
        # Recording a metric is marked experimental; without this every prediction's logs would say so.
        warnings.simplefilter("ignore", ExperimentalFeatureWarning)

    def healthcheck(self) -> bool:
        """Whether predictions can still be made; the server says UNHEALTHY where not."""
        return self.batcher.is_alive()

    async def predict(
        self,
        image: Path = Input(description="Input image"),
        task: str = Input(
            choices=["image_captioning", "visual_question_answering", "image_text_matching"],
            default="image_captioning",
            description="Choose a task.",
        ),
        question: Optional[str] = Input(
            default=None,
            description="Type question for the input image for visual question answering task.",
        ),
        caption: Optional[str] = Input(
            default=None,
            description="Type caption for the input image for image text matching task.",
        ),
    ) -> str:
        """Run one task on one image; a missing or blank text that the task needs is a ValueError."""
        return await self.run(image, task, question, caption)

    async def run(
        self,
        image: Path,
        task: str,
        question: Optional[str],
        caption: Optional[str],
        emit: Optional[Callable[[str], None]] = None,
    ) -> str:
        """The output string of one request, whose pieces `emit` is given in the batching thread as they form."""
        name, text = {
            "image_captioning": ("", None),
            "visual_question_answering": ("question", question),
            "image_text_matching": ("caption", caption),
        }[task]
        text = text or ""
        if name and not text.strip():
            raise ValueError(f"{name} is required for {task}")
        loop = asyncio.get_running_loop()
        sample = await loop.run_in_executor(self.decoders, self.tasks.prepare, task, image, text, emit)
        result = await asyncio.wrap_future(self.batcher.submit(task, sample))
        record_metrics(queue_time=result.queue_time, device_time=result.device_time, batch_size=result.batch_size)
        return str(result.value)


def end_worker() -> None:
    """End this process when the predictions that wait have had time to take their error; the server ends with it."""
    threading.Timer(1.0, os._exit, [1]).start()


def record_metrics(**metrics: float) -> None:
    """Add to the metrics of the prediction at hand; times in seconds."""
    try:
        scope = current_scope()
    except RuntimeError:  # called without the server
        return
    for name, value in metrics.items():
        scope.record_metric(name, value)


class StreamingPredictor(Predictor):
    """The same answers as they form; chosen with COG_PREDICT_TYPE_STUB=predict.py:StreamingPredictor."""

    async def predict(
        self,
        image: Path = Input(description="Input image"),
        task: str = Input(
            choices=["image_captioning", "visual_question_answering", "image_text_matching"],
            default="image_captioning",
            description="Choose a task.",
        ),
        question: Optional[str] = Input(
            default=None,
            description="Type question for the input image for visual question answering task.",
        ),
        caption: Optional[str] = Input(
            default=None,
            description="Type caption for the input image for image text matching task.",
        ),
    ) -> AsyncConcatenateIterator[str]:
        """Yield a word as soon as it is certain; joined the words are the string that Predictor returns."""
        loop = asyncio.get_running_loop()
        words: asyncio.Queue[Optional[str]] = asyncio.Queue()

        def emit(word: str) -> None:
            loop.call_soon_threadsafe(words.put_nowait, word)

        running = asyncio.create_task(self.run(image, task, question, caption, emit))
        running.add_done_callback(lambda _: words.put_nowait(None))
        try:
            while word := await words.get():
                yield word
            await running
        finally:
            running.cancel()
