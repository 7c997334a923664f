"""One way to run BLIP, timed in a process of its own.

    python -m benchmarks.contender [--small] NAME TASK ...

NAME is lavis, hf, openvino-PRECISION or one of our precisions; a TASK is a key of TASKS. It answers every line on
stdin, a task and the seed of an image, with a line of JSON: the seconds taken, the output, the peak memory since
loading in bytes. race.py runs it, for hf and OpenVINO in the environments of their requirements, where there is neither
LAVIS nor what our code needs: so those are imported where they are used.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OPENVINO = "openvino-"  # before a precision
OPENVINO_PRECISIONS = ("float32", "bfloat16", "int8")  # the last are weights only
QUESTION = "what colour is the dog left of the circle?"
TEXT = "a red dog and a blue circle left of there"
Run = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Task:
    """What is asked of a model.

    Attributes:
        kind: caption, answer or match.
        image_size: pixels a side, of the full-size model.
        length: tokens of the result with its prompt.
    """

    kind: str
    image_size: int
    length: int = 0


TASKS = {
    "caption-12": Task("caption", 384, 12),
    "caption-30": Task("caption", 384, 30),
    "answer-4": Task("answer", 480, 4),
    "answer-10": Task("answer", 480, 10),
    "match": Task("match", 384),
}


@dataclass(frozen=True)
class Loaded:
    """A model that runs one task on pictures of its size.

    `prepare` makes what the model takes of a picture (1, S, S, 3) uint8.
    """

    run: Run
    prepare: Callable[[Tensor], Tensor]
    image_size: int
    device: torch.device

    def timed(self, seed: int) -> dict[str, Any]:
        """One run on the image of `seed`."""
        size, generator = (1, self.image_size, self.image_size, 3), torch.Generator().manual_seed(seed)
        picture = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        pixels = self.prepare(picture).to(self.device)
        start = time.perf_counter()
        output = self.run(pixels)  # ends with its result on the CPU
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "output": output, "peak": peak(self.device)}


def main() -> None:
    """Load, warm up, then serve stdin."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contender")
    parser.add_argument("--small", action="store_true", help="models of the tests' size")
    parser.add_argument("name")
    parser.add_argument("task", choices=TASKS, nargs="+")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    loaded = {}
    with contextlib.redirect_stdout(sys.stderr):  # for answers alone
        for name in options.task:
            loaded[name] = load(options.name, TASKS[name], device, options.small)
            loaded[name].timed(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    for line in sys.stdin:
        name, seed = line.split()
        print(json.dumps(loaded[name].timed(int(seed))), flush=True)


def load(name: str, task: Task, device: torch.device, small: bool) -> Loaded:
    """The model of that name."""
    if name == "hf":
        return hugging_face(task, device)
    if name.startswith(OPENVINO):
        return hugging_face(task, device, openvino=name.removeprefix(OPENVINO))
    return lavis_or_ours(name, task, device, small)


def peak(device: torch.device) -> int:
    """The most memory that was in use, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def lavis_or_ours(name: str, task: Task, device: torch.device, small: bool) -> Loaded:
    """LAVIS or our engine, on the same random weights."""
    from benchmarks.random_blip import FULL, FULL_VOCABULARY, SMALL, normalised, random_blip, tokenizer

    config = SMALL if small else {**FULL, "image_size": task.image_size}
    with tempfile.TemporaryDirectory() as folder:
        words = tokenizer(Path(folder), 0 if small else FULL_VOCABULARY)
    net = random_blip(task.kind, 0, words, config)
    if name == "lavis":
        return Loaded(lavis(net.to(device), task), normalised, config["image_size"], device)
    return Loaded(ours(net, task, device, name), lambda picture: picture, config["image_size"], device)


def lavis(net: Any, task: Task) -> Run:
    """LAVIS as the reference build calls it: gradients tracked, and the image encoded for each head."""
    net.requires_grad_(True)
    lengths = task.length, task.length

    def caption(pixels: Tensor) -> Any:
        low, high = lengths
        return net.generate({"image": pixels}, min_length=low, max_length=high)[0]

    def answer(pixels: Tensor) -> Any:
        samples = {"image": pixels, "text_input": [QUESTION]}
        low, high = lengths
        return net.predict_answers(samples, inference_method="generate", min_len=low, max_len=high)[0]

    def match(pixels: Tensor) -> Any:
        samples = {"image": pixels, "text_input": [TEXT]}
        logits = net(samples, match_head="itm")
        return [float(logits.softmax(dim=1)[0, 1]), float(net(samples, match_head="itc"))]

    return {"caption": caption, "answer": answer, "match": match}[task.kind]


def ours(net: Any, task: Task, device: torch.device, dtype: str) -> Run:
    """Our engine as it is served: on a GPU with its graphs."""
    from blip import engine
    from blip.engine.graphs import CudaRecorder
    from blip.engine.kernels import keep_memory
    from blip.engine.model import Model
    from blip.engine.precision import chosen, prepare

    search = engine.Search(num_beams=3, min_length=task.length, max_length=task.length)
    size = net.visual_encoder.patch_embed.img_size[0]
    net = prepare(net, device, dtype, chosen(net, device, dtype))
    model = Model(net, device, size, search if task.kind != "match" else None)
    if device.type == "cpu":
        keep_memory()
    else:
        model = model.with_graphs(1, CudaRecorder())

    def run(pixels: Tensor) -> Any:
        result: Any
        if task.kind == "caption":
            (result,) = engine.caption(model.net, pixels, search, model.texts)
        elif task.kind == "answer":
            (result,) = engine.answer(model.net, pixels, [QUESTION], search, model.texts)
        else:
            (result,) = engine.match(model.net, pixels, [TEXT], model.matches)
        if isinstance(result, Exception):
            raise result
        return engine.text_of(model.net, result) if isinstance(result, engine.Tokens) else result

    return run


def hugging_face(
    task: Task,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 1,
    small: bool = False,
    compiled: bool = False,
    openvino: str | None = None,
) -> Loaded:
    """The BLIP of Hugging Face's transformers, of the same dimensions; the same number of tokens goes in and out.

    It takes batches of `batch`; captions also of fewer, as the last of a folder may be. With a precision of `openvino`
    its parts run in OpenVINO.
    """
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipForImageTextRetrieval,
        BlipForQuestionAnswering,
    )

    less = {"num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 48} if small else {}
    size = 32 if small else task.image_size
    config = BlipConfig(
        text_config={"num_attention_heads": 12, "vocab_size": 30524, **less},
        vision_config={"image_size": size, "initializer_range": 0.02, **less},
    )
    classes = {
        "caption": BlipForConditionalGeneration,
        "answer": BlipForQuestionAnswering,
        "match": BlipForImageTextRetrieval,
    }
    model = classes[task.kind](config).eval().to(device, dtype)
    if compiled:
        for part in model.children():  # generate itself cannot be compiled
            part.compile(backend="eager" if small else "inductor")
    prompt = torch.tensor([[30522, 5, 6, 7, 102]], device=device).repeat(batch, 1)  # [DEC] a picture of [SEP]
    text = torch.arange(200, 212, device=device).repeat(batch, 1)  # as many tokens as QUESTION and TEXT have
    if openvino:
        from benchmarks.openvino_blip import convert

        convert(model, openvino, text)
    searching = {"num_beams": 3, "min_length": task.length, "max_length": task.length}

    @torch.no_grad()
    def run(pixels: Tensor) -> Any:
        if task.kind == "caption":
            return model.generate(pixel_values=pixels, input_ids=prompt[: len(pixels)], **searching).tolist()
        if task.kind == "answer":
            return model.generate(pixel_values=pixels, input_ids=text, **searching).tolist()
        logits = model(pixel_values=pixels, input_ids=text, use_itm_head=True)[0]
        cosines = model(pixel_values=pixels, input_ids=text, use_itm_head=False)[0]  # (B, B)
        return [logits.softmax(dim=1)[:, 1].tolist(), cosines.diagonal().tolist()]

    return Loaded(run, lambda picture: picture.permute(0, 3, 1, 2) / 127.5 - 1, size, device)


if __name__ == "__main__":
    main()
