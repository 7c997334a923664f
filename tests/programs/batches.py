"""Asks full-width models of one layer for samples alone and in batches, bit for bit: batches FOLDER THREADS DTYPE.

Prints the name of each result that depends on the batch. FOLDER is for a vocabulary.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.random_blip import FULL, random_blip, random_pixels, tokenizer
from blip.engine import forward
from blip.engine.decoder import CachedDecoder, DecoderShape
from blip.engine.generate import ANSWER, CAPTION, caption_prompt, tokenize
from blip.engine.precision import prepare

LAYERS: dict[str, Any] = {
    **FULL,
    "image_size": 176,  # 122 states
    "vision": {**FULL["vision"], "depth": 1},
    "text": {**FULL["text"], "num_hidden_layers": 1},
}
BATCHES = (2, 3, 5, 8, 16)
LENGTHS = (16, 48)  # of texts, in tokens
Results = Callable[[int, int], Iterator[tuple[str, Tensor]]]


def results(task: str, words: Any, dtype: str) -> Results:
    """What a model of a task comes to for so many samples, whose texts have so many tokens."""
    net = prepare(random_blip(task, 1, words, LAYERS), torch.device("cpu"), dtype)
    pixels = random_pixels(max(BATCHES), 1, LAYERS["image_size"])
    search = CAPTION if task == "caption" else ANSWER

    def steps(decoder: CachedDecoder, logits: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "first", logits
        batch, beams = decoder.shape.batch, decoder.shape.beams
        for name in ("second", "third"):
            yield name, decoder.step(torch.arange(9, 9 + beams).expand(batch, -1), torch.zeros(batch, beams).long())

    def caption(batch: int, _: int) -> Iterator[tuple[str, Tensor]]:
        prompt = caption_prompt(net).expand(batch, -1)
        states = net.visual_encoder.pos_embed.shape[1]
        decoder = CachedDecoder(net.text_decoder, DecoderShape(batch, states, False, prompt.shape[1], search))
        yield from steps(decoder, forward.begin_caption(net, decoder, pixels[:batch], prompt))

    def answer(batch: int, length: int) -> Iterator[tuple[str, Tensor]]:
        prompt = torch.full((batch, 1), words.bos_token_id)
        decoder = CachedDecoder(net.text_decoder, DecoderShape(batch, length, True, 1, search))
        ids, mask = texts(batch, length)
        yield from steps(decoder, forward.begin_answer(net, decoder, pixels[:batch], ids, mask, prompt))

    def match(batch: int, length: int) -> Iterator[tuple[str, Tensor]]:
        yield "scores", forward.match_scores(net, pixels[:batch], *texts(batch, length))

    def texts(batch: int, length: int) -> tuple[Tensor, Tensor]:
        text = (tokenize(net, "what is the red circle on the left of ?") * length)[:length]
        ids = torch.tensor(text).expand(batch, -1)
        return ids, torch.ones_like(ids).bool()

    return {"caption": caption, "answer": answer, "match": match}[task]


@torch.inference_mode()
def main(folder: Path, threads: int, dtype: str) -> None:
    torch.set_num_threads(threads)
    words = tokenizer(folder)
    for task in ("caption", "answer", "match"):
        found = results(task, words, dtype)
        for length in LENGTHS:
            alone = dict(found(1, length))
            for batch in BATCHES:
                for name, result in found(batch, length):
                    if name not in alone or not result[:1].equal(alone[name]):
                        print(f"{task}, texts of {length} tokens, batch of {batch}: {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
