"""One way to run BLIP, timed in a process of its own.

    python benchmarks/contender.py NAME TASK

NAME is lavis, hf or one of our precisions; TASK is a key of TASKS. It answers every line on stdin, the seed of an
image, with a line of JSON: the seconds taken, the output, the peak memory since loading in bytes. latency.py runs it,
for hf in the environment of requirements-hf.txt, where there is neither LAVIS nor what our code needs.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

QUESTION = "what colour is the dog left of the circle?"
TEXT = "a red dog and a blue circle left of there"
#: name -> (task, image size in pixels, tokens of the result with its prompt)
TASKS = {
    "caption-12": ("caption", 384, 12),
    "caption-30": ("caption", 384, 30),
    "answer-4": ("answer", 480, 4),
    "answer-10": ("answer", 480, 10),
    "match": ("match", 384, 0),
}
Run = Callable[[Tensor], Any]


def main() -> None:
    """Load, warm up, then serve stdin."""
    name, task = sys.argv[1:]
    kind, size, length = TASKS[task]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    run = hugging_face(kind, size, length, device) if name == "hf" else lavis_or_ours(name, kind, size, length, device)
    timed(run, size, 0, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    for line in sys.stdin:
        print(json.dumps(timed(run, size, int(line), device)), flush=True)


def timed(run: Run, size: int, seed: int, device: torch.device) -> dict[str, Any]:
    """One run on the image of `seed`."""
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(device)
    start = time.perf_counter()
    output = run(pixels)  # ends with its result on the CPU
    seconds = time.perf_counter() - start
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(fields["VmHWM"].split()[0]) * 1024
    return {"seconds": seconds, "output": output, "peak": peak}


def lavis_or_ours(name: str, kind: str, size: int, length: int, device: torch.device) -> Run:
    """LAVIS as the reference build calls it, gradients tracked and the image encoded for each head; or our engine."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from benchmarks.random_blip import FULL, FULL_VOCABULARY, random_blip, tokenizer
    from blip import engine
    from blip.precision import prepare

    with tempfile.TemporaryDirectory() as folder:
        words = tokenizer(Path(folder), FULL_VOCABULARY)
    model = random_blip(kind, 0, words, {**FULL, "image_size": size})
    if name == "lavis":
        model.requires_grad_(True).to(device)

        def generated(pixels: Tensor) -> Any:
            if kind == "caption":
                return model.generate({"image": pixels}, min_length=length, max_length=length)[0]
            return model.predict_answers(
                {"image": pixels, "text_input": [QUESTION]}, inference_method="generate", min_len=length, max_len=length
            )[0]

        def matched(pixels: Tensor) -> Any:
            samples = {"image": pixels, "text_input": [TEXT]}
            logits = model(samples, match_head="itm")
            return [float(logits.softmax(dim=1)[0, 1]), float(model(samples, match_head="itc"))]

        return matched if kind == "match" else generated

    prepare(model, device, name)

    def ours(pixels: Tensor) -> Any:
        result: Any
        if kind == "caption":
            (result,) = engine.caption(model, pixels, min_length=length, max_length=length)
        elif kind == "answer":
            (result,) = engine.answer(model, pixels, [QUESTION], min_length=length, max_length=length)
        else:
            (result,) = engine.match(model, pixels, [TEXT])
        if isinstance(result, Exception):
            raise result
        return result

    return ours


def hugging_face(kind: str, size: int, length: int, device: torch.device) -> Run:
    """The BLIP of Hugging Face's transformers, of the same dimensions; the same number of tokens goes in and out."""
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipForImageTextRetrieval,
        BlipForQuestionAnswering,
    )

    config = BlipConfig(
        text_config={"num_attention_heads": 12, "vocab_size": 30524},
        vision_config={"image_size": size, "initializer_range": 0.02},
    )
    classes = {
        "caption": BlipForConditionalGeneration,
        "answer": BlipForQuestionAnswering,
        "match": BlipForImageTextRetrieval,
    }
    model = classes[kind](config).eval().to(device)
    prompt = torch.tensor([[30522, 5, 6, 7, 102]], device=device)  # [DEC] a picture of [SEP]
    text = torch.arange(200, 212, device=device)[None]  # as many tokens as QUESTION and TEXT have
    searching = {"num_beams": 3, "min_length": length, "max_length": length}

    @torch.no_grad()
    def run(pixels: Tensor) -> Any:
        if kind == "caption":
            return model.generate(pixel_values=pixels, input_ids=prompt, **searching).shape[1]
        if kind == "answer":
            return model.generate(pixel_values=pixels, input_ids=text, **searching).shape[1]
        logits = model(pixel_values=pixels, input_ids=text, use_itm_head=True)[0]
        cosine = model(pixel_values=pixels, input_ids=text, use_itm_head=False)[0]
        return [float(logits.softmax(dim=1)[0, 1]), float(cosine)]

    return run


if __name__ == "__main__":
    main()
