"""The predictor that the Cog server loads: the inputs and the output; the work is in blip/."""

import inspect
import warnings
from typing import TYPE_CHECKING, Any, Optional

from cog import AsyncConcatenateIterator, BasePredictor, ExperimentalFeatureWarning, Input, Path, current_scope

if TYPE_CHECKING:
    from blip.batcher import Result

# blip/ is imported when it is used: the server's own process reads this file only for its signatures.


class Predictor(BasePredictor):
    """Image captions, answers about an image, and image-text match scores from three BLIP models."""

    def setup(self) -> None:
        """Load the models and make one real prediction of each task."""
        from blip.config import Settings
        from blip.service import start

        self.service = start(Settings.from_environment())
        self.facts = self.service.facts  # for the server, which shows them to operators
        # Recording a metric is marked experimental; without this every prediction's logs would say so.
        warnings.simplefilter("ignore", ExperimentalFeatureWarning)

    def healthcheck(self) -> bool:
        """Whether predictions can still be made; the server says UNHEALTHY where not."""
        return self.service.is_alive()

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
        """Run one task on one image; a missing or blank text that the task needs is an error."""
        from blip.service import Request

        result = await self.service.run(Request(image, task, question, caption))
        record_metrics(result)
        return str(result.value)


class StreamingPredictor(Predictor):
    """The same answers as they form; chosen with COG_PREDICT_TYPE_STUB=predict.py:StreamingPredictor."""

    async def predict(self, **inputs: Any) -> AsyncConcatenateIterator[str]:  # type: ignore[override]
        """Yield a word as soon as it is certain; joined the words are the string that Predictor returns."""
        from blip.service import Request

        async for word in self.service.stream(Request(**inputs)):
            if isinstance(word, str):
                yield word
            else:
                record_metrics(word)

    # The server reads the inputs from the signature: they are Predictor's.
    predict.__signature__ = inspect.signature(Predictor.predict).replace(  # type: ignore[attr-defined]
        return_annotation=AsyncConcatenateIterator[str]
    )


def record_metrics(result: "Result") -> None:
    """Add how the batch ran to the current prediction's metrics; times in seconds."""
    try:
        scope = current_scope()
    except RuntimeError:  # called without the server
        return
    scope.record_metric("queue_time", result.queue_time)
    scope.record_metric("device_time", result.device_time)
    scope.record_metric("decode_time", result.decode_time)
    scope.record_metric("batch_size", result.batch_size)
