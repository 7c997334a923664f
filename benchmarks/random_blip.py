"""LAVIS's BLIP models with random weights, small for the tests and full-size for the benchmark."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip.lavis import build, fill, import_lavis, make_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = (
    "a picture of the what is colour how many there circle square red blue left right above below one two and on "
    "dog runs surf ##board ##s ##ing do n ' t s m ve re v ##e ##t ##' n't . , ? ! - ##z"
).split()
#: Odd dimensions, so that mixing up two of them shows. With this gain few layers are enough for a small difference of
#: the input to change the caption; in the many layers of the full size every rounding error would change it.
SMALL: dict[str, Any] = {
    "gain": 3.0,
    "image_size": 30,
    "vision": {"patch_size": 6, "embed_dim": 40, "depth": 2, "num_heads": 4},
    "text": {
        "hidden_size": 48,
        "encoder_width": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 72,
        "max_position_embeddings": 40,
        "add_type_embeddings": False,
        "add_cross_attention": True,
    },
    "prompt": "a picture of ",
    "max_txt_len": 12,
    "embed_dim": 20,
}
#: BLIP base; a vocabulary of 30,524 goes with it.
FULL: dict[str, Any] = {
    "gain": 1.75,
    "image_size": 384,
    "vision": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "text": {
        "hidden_size": 768,
        "encoder_width": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
        "add_type_embeddings": False,
        "add_cross_attention": True,
    },
    "prompt": "a picture of ",
    "max_txt_len": 40,
    "embed_dim": 256,
}
FULL_VOCABULARY = 30522  # without the two tokens that BLIP adds


def tokenizer(folder: Path, size: int = 0) -> Any:
    """BLIP's tokenizer on a vocabulary of words, pieces of words and punctuation, filled up to `size` tokens."""
    known = SPECIAL + WORDS
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("".join(f"{token}\n" for token in known + [f"w{i}" for i in range(len(known), size)]))
    return make_tokenizer(vocabulary)


def dimensions(task: str, tokenizer: Any, config: dict[str, Any]) -> dict[str, Any]:
    """`config` for a task and a vocabulary, as a bundle has it."""
    text = {"vocab_size": len(tokenizer), **config["text"]}
    vision = dict(config["vision"])
    if task == "answer":  # the decoder reads the text encoder's states, the text encoder the image's, in one width
        text["encoder_width"] = vision["embed_dim"] = text["hidden_size"]
    return {**config, "text": text, "vision": vision}


def random_blip(task: str, seed: int, tokenizer: Any, config: dict[str, Any] = SMALL, end: float = 1.0) -> Any:
    """LAVIS's model of `task` with random weights, so scaled that one token is usually far likelier than the next.

    `end` is added to the end token's bias, so that texts end at different lengths.
    """
    net = build(task, dimensions(task, tokenizer, config), tokenizer)
    generator = torch.Generator().manual_seed(seed)

    def weights(name: str, shape: torch.Size) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if "norm" in name.lower():
            values = values * 0.1 + (1 if name.endswith("weight") else 0)
        elif name.endswith("word_embeddings.weight"):
            values *= 3 / shape[-1] ** 0.5  # logits with a standard deviation of about 3
        elif "embed" in name:
            pass
        elif len(shape) > 1:
            values *= config["gain"] / shape[1:].numel() ** 0.5
        else:
            values *= 0.1
        return values

    fill(
        net,
        {name: weights(name, parameter.shape) for name, parameter in net.named_parameters()},
        torch.device("cpu"),
        torch.float32,
        where="random weights",
    )
    if task != "match":
        net.text_decoder.cls.predictions.bias.data[tokenizer.sep_token_id] += end
    return net.eval()


def random_pixels(count: int, seed: int, size: int = SMALL["image_size"]) -> Tensor:
    """Pictures of noise, (count, size, size, 3) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def fail_on_black(net: Any, value: float) -> None:
    """Let the image encoder of `net` come to `value`, not a finite one, for pictures whose first pixel is black."""
    black = net.pixel_values[:, 0]

    def spoil(_: Any, inputs: tuple[Tensor], patches: Tensor) -> Tensor:
        (pixels,) = inputs
        failing = (pixels[:, :, 0, 0] == black).all(1)  # (B,)
        return patches.masked_fill(failing[:, None, None], value)

    net.visual_encoder.patch_embed.register_forward_hook(spoil)


def normalised(pixels: Tensor) -> Tensor:
    """Pictures (B, S, S, 3) uint8 as LAVIS takes them: (B, 3, S, S) float32, by its own processor after its resize."""
    processor = import_lavis().blip_processors.BlipImageEvalProcessor().transform
    after_resize = type(processor)(processor.transforms[1:])
    return torch.stack([after_resize(picture.numpy()) for picture in pixels.cpu()])
