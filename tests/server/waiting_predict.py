"""The real streaming predictor; its setup and, after three words, its predictions wait until a file is gone.

BLIP_TEST_HOLD names the file.
"""

import asyncio
import inspect
import os
import time
from pathlib import Path
from typing import Any

from cog import AsyncConcatenateIterator

from predict import StreamingPredictor

HOLD = Path(os.environ["BLIP_TEST_HOLD"])


class Predictor(StreamingPredictor):
    def setup(self) -> None:
        super().setup()
        while HOLD.exists():
            time.sleep(0.05)

    async def predict(self, **inputs: Any) -> AsyncConcatenateIterator[str]:  # type: ignore[override]
        given = 0
        async for word in super().predict(**inputs):
            yield word
            given += 1
            while given == 3 and HOLD.exists():
                await asyncio.sleep(0.05)

    predict.__signature__ = inspect.signature(StreamingPredictor.predict)  # type: ignore[attr-defined]
