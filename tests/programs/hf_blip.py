"""Hugging Face's newest BLIP, to compare with: answers each line of JSON on stdin with one on stdout.

It runs with transformers 5 before our own packages, and imports nothing of ours. What is asked for:

    {"make": DIR, "kind": CLASS, "seed": N, "sizes": {...}, "words": [...]}    a model with random weights
    {"load": DIR, "images": [PATH], "texts": [TEXT], "generate": {...}}        its outputs, one image at a time
    {"encode": DIR, "texts": [TEXT]}                                           the ids of each text
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
)

CLASSES = {
    kind.__name__: kind for kind in (BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering)
}


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = make if "make" in asked else encode if "encode" in asked else run
        print(json.dumps(answer(**asked)), flush=True)


def make(*, make: str, kind: str, seed: int, sizes: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """Random weights of the size that training leaves, so that one word is usually far likelier than the next."""
    directory = Path(make)
    directory.mkdir(parents=True)
    config = BlipConfig(
        text_config=sizes["text"], vision_config=sizes["vision"], image_text_hidden_size=sizes.get("shared", 24)
    )
    torch.manual_seed(seed)
    model = CLASSES[kind](config).eval()
    gain = sizes.get("gain", 3.0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name.lower():
                value.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
            elif name.endswith("word_embeddings.weight"):
                value.normal_(0, 3 / value.shape[-1] ** 0.5)
            elif "embed" in name:
                value.normal_(0, 1)
            elif value.ndim > 1:
                value.normal_(0, gain / value.shape[1:].numel() ** 0.5)
            else:
                value.normal_(0, 0.1)
        if hasattr(model, "text_decoder"):
            model.text_decoder.cls.predictions.bias[config.text_config.sep_token_id] += sizes.get("end", 2.0)
    if sizes.get("half"):
        model.half()
    model.save_pretrained(directory, max_shard_size=sizes.get("shard", "5GB"))
    (directory / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    processor = BlipProcessor(
        BlipImageProcessor(size=dict.fromkeys(("height", "width"), sizes["vision"]["image_size"])),
        BertTokenizer.from_pretrained(directory),
    )
    processor.save_pretrained(directory)
    return {"files": sorted(path.name for path in directory.iterdir())}


def encode(*, encode: str, texts: list[str]) -> list[list[int]]:
    """What its processor makes of texts."""
    processor = BlipProcessor.from_pretrained(encode)
    return [processor(text=text)["input_ids"] for text in texts]


@torch.no_grad()
def run(*, load: str, images: list[str], texts: list[str] | None, generate: dict[str, Any]) -> dict[str, Any]:
    """Token ids of captions and answers, or the two numbers of a match; and the pixels of the first image."""
    settings = json.loads((Path(load) / "config.json").read_text())
    model = CLASSES[settings["architectures"][0]].from_pretrained(load, dtype=torch.float32).eval()
    processor = BlipProcessor.from_pretrained(load)
    outputs: list[Any] = []
    pixels = None
    for image, text in zip(images, texts or itertools.repeat(None, len(images)), strict=True):
        with Image.open(image) as picture:
            inputs = processor(images=picture, text=text, return_tensors="pt")
        pixels = inputs["pixel_values"] if pixels is None else pixels
        if isinstance(model, BlipForImageTextRetrieval):
            score = model(**inputs, use_itm_head=True).itm_score.softmax(-1)[0, 1]
            cosine = model(**inputs, use_itm_head=False).itm_score[0, 0]
            outputs.append([score.item(), cosine.item()])
        else:
            outputs.append(model.generate(**inputs, **generate)[0].tolist())
    return {"outputs": outputs, "pixels": pixels.flatten().tolist() if pixels is not None else []}


if __name__ == "__main__":
    main()
