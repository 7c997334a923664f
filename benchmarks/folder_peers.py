"""What a folder captioner is measured against, each in a process of its own.

    python -m benchmarks.folder_peers engine
    python -m benchmarks.folder_peers hf VOCABULARY LENGTH [--small]

engine is our engine alone, as the environment sets it: pictures that are decoded before the clock starts, batches as
large as they may be. hf is Hugging Face's BLIP as tools for folders use it: one loop that opens pictures, has its
processor make a batch of them, generates LENGTH tokens and writes a text file beside each. Both answer every line on
stdin, a folder of JPEGs, with a line of JSON: the seconds taken, engine with the captions too. folder.py runs them, hf
in the environment of requirements-hf.txt, where there is little of what our code needs: so that is imported where it is
used.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contender import Task, hugging_face
from blip.batcher import NICE

TASK = "image_captioning"
BATCH = 8  # of Hugging Face's BLIP; what kohya-ss/sd-scripts, for one, has in its examples
Captioner = Callable[[Sequence[Path]], dict[str, Any]]


def main() -> None:
    """Load, then serve stdin."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.folder_peers")
    peers = parser.add_subparsers(dest="peer", required=True)
    peers.add_parser("engine")
    theirs = peers.add_parser("hf")
    theirs.add_argument("vocabulary", type=Path)
    theirs.add_argument("length", type=int)
    theirs.add_argument("--small", action="store_true", help="a model of the tests' size, one picture at a time")
    options = parser.parse_args()
    os.nice(NICE)  # as our batching thread: what else the machine does is to take as much from all
    with contextlib.redirect_stdout(None):  # for answers alone
        caption = engine() if options.peer == "engine" else hf(options.vocabulary, options.length, options.small)
    for line in sys.stdin:
        print(json.dumps(caption(sorted(Path(line.rstrip("\n")).glob("*.jpg")))), flush=True)


def engine() -> Captioner:
    """Our engine, loaded as the program loads it."""
    from blip.config import Settings
    from blip.service import start

    settings = Settings.from_environment()
    service = start(settings)
    task = service.tasks[TASK]

    async def decoded(pictures: Sequence[Path]) -> list[bytearray]:
        return [await service.pictures.pixels(picture, task.model.image_size) for picture in pictures]

    def caption(pictures: Sequence[Path]) -> dict[str, Any]:
        samples = [task.prepare(pixels, "") for pixels in asyncio.run(decoded(pictures))]
        outputs: list[str] = []
        start = time.perf_counter()
        for first in range(0, len(samples), settings.max_batch):
            outputs += map(task.say, task.run(samples[first : first + settings.max_batch]))
        return {"seconds": time.perf_counter() - start, "outputs": outputs}

    return caption


def hf(vocabulary: Path, length: int, small: bool) -> Captioner:
    """Hugging Face's BLIP; on a GPU in float16, as ours is."""
    from PIL import Image
    from transformers import BertTokenizerFast, BlipImageProcessor, BlipProcessor

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    most = 1 if small else BATCH  # the transformers of a trial, 4.26, fails with beams for several pictures
    loaded = hugging_face(Task("caption", 384, length), device, dtype, batch=most, small=small)
    size = {"height": loaded.image_size, "width": loaded.image_size}
    processor = BlipProcessor(BlipImageProcessor(size=size), BertTokenizerFast.from_pretrained(vocabulary.parent))

    def caption(pictures: Sequence[Path]) -> dict[str, Any]:
        start = time.perf_counter()
        for first in range(0, len(pictures), most):
            batch = pictures[first : first + most]
            images = [Image.open(picture).convert("RGB") for picture in batch]
            pixels = processor(images=images, return_tensors="pt").pixel_values
            texts = processor.batch_decode(loaded.run(pixels.to(device, dtype)), skip_special_tokens=True)
            for picture, text in zip(batch, texts, strict=True):
                picture.with_suffix(".txt").write_text(text)
        return {"seconds": time.perf_counter() - start}

    return caption


if __name__ == "__main__":
    main()
