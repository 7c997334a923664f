"""What the names and shapes of a checkpoint's weights say about its model. All names are LAVIS's."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from blip.errors import BundleError

Shapes = Mapping[str, Sequence[int]]

#: What a model of each task is for, and of a pretraining, which has parts for two of them.
PURPOSES = {"caption": "captions", "answer": "answers to questions", "match": "image-text matching"}
LARGEST_IMAGE = 1024  # pixels a side; attention grows with the fourth power
HEAD_WIDTH = 64  # of BERT and ViT in every size that BLIP has; weights do not show it
#: What training leaves in a checkpoint beside the model: momentum copies, queues, the temperature, buffers,
#: and a pooler that no task reads.
_STATE = re.compile(
    r"\w+_m\..*|(image|text|idx|ptr)_queue|queue_ptr|temp|logit_scale|.*\bposition_ids|text_\w+\.(bert\.)?pooler\..*"
)
#: The parts of a pretraining checkpoint that a task does not use.
_SPARE = {
    "caption": re.compile(r"(text_encoder|vision_proj|text_proj|itm_head)\..*"),
    "match": re.compile(r"text_decoder\..*"),
}
_TEXT = {"caption": "text_decoder.bert.", "answer": "text_encoder.", "match": "text_encoder."}
#: Beginnings of names that other models have, for a sentence that says what a file is.
_OTHERS = {
    "BLIP-2": ("Qformer.", "qformer.", "query_tokens", "language_model.", "opt_model.", "t5_model."),
    "CLIP": ("visual.", "text_model.", "token_embedding.", "transformer.resblocks."),
}


def check_kind(task: str, names: Collection[str], where: Path) -> None:
    """Refuse the weights of another kind of model than the task needs.

    Raises:
        BundleError: it says what they are.
    """
    for model, beginnings in _OTHERS.items():
        if any(name.startswith(beginnings) for name in names):
            raise BundleError(f"{where} is a {model} model and not a BLIP; give a BLIP checkpoint.")
    kind = _kind(names)
    if kind == "pretraining" and task == "answer":
        raise BundleError(f"{where} is a pretraining checkpoint, which cannot answer questions; give a fine-tuned one.")
    if kind in PURPOSES and kind != task:
        raise BundleError(f"{where} is a model for {PURPOSES[kind]}; give it with --{kind}.")


def _kind(names: Collection[str]) -> str | None:
    decoder, encoder, head = (
        any(name.startswith(part) for name in names) for part in ("text_decoder.", "text_encoder.", "itm_head.")
    )
    if decoder and encoder:
        return "pretraining" if head else "answer"
    return "caption" if decoder else "match" if encoder and head else None


def left_over(
    task: str, names: Collection[str], used: Collection[str], where: Path, *, strict: bool = True
) -> list[str]:
    """The names that the model does not use and need not: training state, and other heads of a pretraining.

    Raises:
        BundleError: there are others, and `strict`; it names them.
    """
    spare = _SPARE.get(task) if _kind(names) == "pretraining" else None
    unused = sorted(set(names) - set(used))
    strange = [name for name in unused if not _STATE.fullmatch(name) and not (spare and spare.fullmatch(name))]
    if strange and strict:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise BundleError(
            f"{where} has weights that a BLIP for {PURPOSES[task]} does not use: {', '.join(strange[:3])}{more}; "
            "give one without them."
        )
    return unused


def dimensions(task: str, shapes: Shapes, where: Path, heads: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The part of a config.json that the weights determine.

    Args:
        task: whose model it is.
        shapes: of all weights, by name.
        where: the file, for errors.
        heads: attention heads, by "vision" and "text"; of `HEAD_WIDTH` where it is None.

    Raises:
        BundleError: a weight that tells is missing or has an impossible shape.
    """

    def shape(name: str, sides: int) -> Sequence[int]:
        if name not in shapes:
            raise BundleError(f"{where} lacks the weight {name}: it is not a BLIP for {PURPOSES[task]}; give one.")
        if len(shapes[name]) != sides or not all(shapes[name]):
            found = list(shapes[name])
            raise BundleError(f"{where} has the weight {name} with shape {found}, which no BLIP has; give a BLIP.")
        return shapes[name]

    def layers(beginning: str) -> int:
        pattern = re.compile(re.escape(beginning) + r"(\d{1,4})\.")
        found = {int(match[1]) for name in shapes if (match := pattern.match(name))}
        for number in range(max(found, default=0)):
            if number not in found:
                raise BundleError(f"{where} lacks the weights {beginning}{number}: it is not whole; fetch it again.")
        return len(found)

    def head_count(part: str, width: int) -> int:
        count = heads[part] if heads else width // HEAD_WIDTH
        if not count or width % count:
            raise BundleError(f"{where} has a {part} width of {width}, which {count} heads cannot share; restore it.")
        return count

    _, positions, width = shape("visual_encoder.pos_embed", 3)
    patch = shape("visual_encoder.patch_embed.proj.weight", 4)[3]
    side = math.isqrt(positions - 1)
    if side == 0 or side**2 != positions - 1:
        raise BundleError(f"{where} has {positions} position embeddings, which fit no square image; give another.")
    if side * patch > LARGEST_IMAGE:
        raise BundleError(f"{where} is for images of {side * patch} pixels; give a model for {LARGEST_IMAGE} at most.")
    vision: dict[str, Any] = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": layers("visual_encoder.blocks."),
        "num_heads": head_count("vision", width),
    }
    inner = shape("visual_encoder.blocks.0.mlp.fc1.weight", 2)[0]
    if inner != 4 * width:
        vision["mlp_ratio"] = inner / width
    text = _TEXT[task]
    words, hidden = shape(f"{text}embeddings.word_embeddings.weight", 2)
    layer = f"{text}encoder.layer.0."
    attended = shape(f"{layer}crossattention.self.key.weight", 2)[1]
    if attended != width:
        raise BundleError(f"{where} has images of width {width} and its texts look at {attended}; give a whole model.")
    config = {
        "image_size": side * patch,
        "vision": vision,
        "text": {
            "hidden_size": hidden,
            "encoder_width": attended,
            "num_hidden_layers": layers(f"{text}encoder.layer."),
            "num_attention_heads": head_count("text", hidden),
            "intermediate_size": shape(f"{layer}intermediate.dense.weight", 2)[0],
            "max_position_embeddings": shape(f"{text}embeddings.position_embeddings.weight", 2)[0],
            "vocab_size": words,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
            "add_type_embeddings": False,
            "add_cross_attention": True,
        },
    }
    return config | ({"embed_dim": shape("vision_proj.weight", 2)[0]} if task == "match" else {})
