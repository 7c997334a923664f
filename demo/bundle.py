"""What the demo bundle is: the models' dimensions, their vocabulary, and how a bundle is written."""

import string
import tempfile
from pathlib import Path
from typing import Any

from blip.lavis import make_tokenizer
from blip.weights.bundle import VOCABULARY, BundleWriter
from demo import sentences

IMAGE_SIZE = 96
VISION = {"patch_size": 12, "embed_dim": 112, "depth": 3, "num_heads": 4}
GRID = IMAGE_SIZE // VISION["patch_size"]
TEXT_WIDTH = VISION["embed_dim"]  # the answer decoder reads both through one config
TEXT_LAYERS = {"caption": 2, "answer": 3, "match": 3}
USE: dict[str, dict[str, Any]] = {
    "caption": {
        "max_txt_len": 40,
        "prompt": "a picture of ",
        "num_beams": 3,
        "max_length": 30,
        "min_length": 10,
    },
    "answer": {"max_txt_len": 35, "num_beams": 3, "max_length": 10, "min_length": 1},
    "match": {"max_txt_len": 35, "embed_dim": 64},
}
MORE_WORDS = (
    "photo drawing illustration this that it its i you he she they we my your these those with "
    "without at by from for not no any some all each more most than as but if so then into over "
    "under near next between behind front beside side up down out off was were be been has have "
    "had do does did can could will would may who when why center middle scene canvas grey gray "
    "black white pink brown big little tiny round figure thing things zero six seven"
)


def vocabulary() -> list[str]:
    """WordPiece tokens by id: known words, and characters for words that are not known."""
    characters = [*string.ascii_lowercase, *string.digits]
    known = [*sentences.words(), *MORE_WORDS.split(), *characters]
    continued = [f"##{character}" for character in characters]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return list(dict.fromkeys([*special, *known, *continued, *"?,'-/&%$+=_"]))


def config(task: str) -> dict[str, Any]:
    """One task's dimensions and use, as its config.json holds them."""
    text = {
        "hidden_size": TEXT_WIDTH,
        "num_hidden_layers": TEXT_LAYERS[task],
        "num_attention_heads": 4,
        "intermediate_size": 2 * TEXT_WIDTH,
        "max_position_embeddings": 48,
        "vocab_size": len(vocabulary()) + 2,  # [DEC] and [ENC]
        "encoder_width": VISION["embed_dim"],
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "add_type_embeddings": False,
        "add_cross_attention": True,
    }
    return {"image_size": IMAGE_SIZE, "vision": VISION, "text": text, **USE[task]}


def new_tokenizer() -> Any:
    """The tokenizer that the bundle's vocabulary makes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / VOCABULARY
        path.write_text("".join(f"{token}\n" for token in vocabulary()))
        return make_tokenizer(path)


def write(nets: dict[str, Any], out: Path, seed: int, steps: int) -> None:
    """Write the bundle in fp16, each model with its own copy of the image encoder."""
    note = f"Trained on drawn scenes by scripts/train_demo --seed {seed} --steps {steps}."
    with BundleWriter(out, name="demo", dtype="float16", source="scripts/train_demo", note=note) as writer:
        writer.vocabulary(vocabulary())
        for task, net in nets.items():
            tensors = {name: value.detach().half() for name, value in net.named_parameters()}
            writer.model(task, config(task), tensors)
