"""A weights bundle of three random models, with texts of a fixed number of tokens, so that runs can be compared."""

from pathlib import Path
from typing import Any

from benchmarks.random_blip import FULL, FULL_VOCABULARY, SMALL, dimensions, random_blip, tokenizer
from blip.weights.bundle import TASKS, BundleWriter

#: Tokens of a caption (its prompt included) and of an answer.
LENGTHS = {"caption": 20, "answer": 4}
SMALL_LENGTHS = {"caption": 12, "answer": 4}
#: As in LAVIS's configurations of the published models: pixels a side, and tokens of a text.
SIZES = {"caption": 384, "answer": 480, "match": 384}
TEXTS = {"caption": 40, "answer": 35, "match": 35}


def write_bundle(path: Path, *, small: bool = False) -> None:
    """Write it to `path`, in float16; full-size it has 1.6 GB."""
    words = tokenizer(path.parent, 0 if small else FULL_VOCABULARY)
    lengths = SMALL_LENGTHS if small else LENGTHS
    with BundleWriter(path, name="random", dtype="float16", source="benchmarks", note="Random.") as writer:
        writer.vocabulary((path.parent / "vocab.txt").read_text().splitlines())
        for task in TASKS:
            config: dict[str, Any] = (
                dict(SMALL) if small else {**FULL, "image_size": SIZES[task], "max_txt_len": TEXTS[task]}
            )
            net = random_blip(task, 0, words, config)
            search = {}
            if task in lengths:
                search = {"num_beams": 3, "min_length": lengths[task], "max_length": lengths[task]}
            kept = {name: value for name, value in dimensions(task, words, config).items() if name != "gain"}
            parameters = {name: parameter.half() for name, parameter in net.named_parameters()}
            writer.model(task, {**kept, **search}, parameters)
