"""A BLIP in the layout of Hugging Face's transformers: its config and its weights, as LAVIS's.

The names and the meaning of the settings are those of transformers 5.23 (configuration_blip.py, modeling_blip.py).
What this release cannot follow is refused by name.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip.errors import BundleError
from blip.weights import hugging_face_inputs
from blip.weights.checkpoint import read_checkpoint
from blip.weights.settings import USUAL_TOKENS
from blip.weights.shapes import Shapes, dimensions
from blip.weights.values import array, count, mapping, number, read, shown

ARCHITECTURES = {
    "caption": "BlipForConditionalGeneration",
    "answer": "BlipForQuestionAnswering",
    "match": "BlipForImageTextRetrieval",
}
#: The files that make a model; of weights safetensors come first.
FILES = ("config.json", *hugging_face_inputs.FILES)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
WEIGHT_PATTERNS = ("model*.safetensors*", "pytorch_model*.bin*")
#: Defaults of BlipTextConfig and BlipVisionConfig.
_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "vocab_size": 30524,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "bos_token_id": 30522,
    "sep_token_id": 102,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 384,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
#: What generate does: 20 tokens after the first. It reads no generation_config.json for these models, and nothing that
#: is called like one of its own settings in config.json: PreTrainedConfig drops those.
_SEARCH = {"num_beams": 1, "min_length": 0, "max_length": 1 + USUAL_TOKENS}
#: What it does read there, and this release cannot do.
_OTHER_SEARCHES = (
    *("max_new_tokens", "min_new_tokens", "max_time", "sequence_bias", "force_words_ids", "penalty_alpha"),
    *("guidance_scale", "stop_strings", "constraints", "watermarking_config", "dola_layers"),
    *("prompt_lookup_num_tokens", "renormalize_logits", "token_healing"),
)
_NAMES = (
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding.", "visual_encoder.patch_embed.proj."),
    ("vision_model.post_layernorm.", "visual_encoder.norm."),
)
_LAYER = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.(.+)")
_IN_LAYER = (
    ("self_attn.qkv.", "attn.qkv."),
    ("self_attn.projection.", "attn.proj."),
    ("layer_norm1.", "norm1."),
    ("layer_norm2.", "norm2."),
)


def check_architecture(directory: Path, task: str) -> None:
    """Refuse another model than the task needs.

    Raises:
        BundleError: it says what it is.
    """
    path = directory / "config.json"
    given = read(path)
    if given.get("model_type") != "blip":
        raise BundleError(f"{path} is of a {shown(given.get('model_type'))} model and not of a BLIP; give a BLIP.")
    architecture = (array(given.get("architectures")) or [ARCHITECTURES[task]])[0]
    if architecture != ARCHITECTURES[task]:
        right = next((name for name, known in ARCHITECTURES.items() if known == architecture), None)
        fix = f"give it with --{right}" if right else f"give one of {', '.join(ARCHITECTURES.values())}"
        raise BundleError(f"{path} is of a {shown(architecture)}; {fix}.")


def settings(directory: Path, task: str, shapes: Shapes) -> tuple[dict[str, Any], list[str]]:
    """The config.json of a bundle for the model in `directory`, and its tokens by id.

    Args:
        directory: in transformers' layout.
        task: what the model shall do.
        shapes: of its weights, by LAVIS's names.

    Raises:
        BundleError: its settings do not fit its weights, or they cannot be followed.
    """
    path = directory / "config.json"
    given = read(path)
    text = {**_TEXT, **mapping(given.get("text_config"))}
    vision = {**_VISION, **mapping(given.get("vision_config"))}
    for name in _OTHER_SEARCHES:
        if text.get(name) not in (None, False):
            raise BundleError(f"{path} asks for {name} {shown(text[name])}, which this server cannot do; remove it.")
    parts = {"text": text, "vision": vision}
    for part, values in parts.items():
        if values["hidden_act"] != "gelu":
            raise BundleError(f"{path} has a {part} hidden_act of {shown(values['hidden_act'])}; only 'gelu' is known.")
    heads = {part: count(path, values, "num_attention_heads") for part, values in parts.items()}
    made = dimensions(task, shapes, directory, heads)
    _check_fit(path, made, text, vision)
    words, named = hugging_face_inputs.vocabulary(directory, made["text"]["vocab_size"])
    made["text"] |= {"layer_norm_eps": number(path, text, "layer_norm_eps"), "pad_token_id": text["pad_token_id"]}
    made["vision"]["layer_norm_eps"] = number(path, vision, "layer_norm_eps")
    search = {} if task == "match" else _SEARCH
    prompt = {"prompt": ""} if task == "caption" else {}
    config = {
        "library": "transformers",
        **made,
        "pixels": hugging_face_inputs.pixels(directory, made["image_size"]),
        "tokenizer": hugging_face_inputs.tokenizer(directory, text, words, named),
        "max_txt_len": hugging_face_inputs.longest_text(directory, made["text"]["max_position_embeddings"]),
        **prompt,
        **search,
    }
    return config, words


def _check_fit(path: Path, made: Mapping[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    ratio = made["vision"].get("mlp_ratio", 4)
    found = {
        "vision": {
            "hidden_size": made["vision"]["embed_dim"],
            "intermediate_size": round(made["vision"]["embed_dim"] * ratio),
            "num_hidden_layers": made["vision"]["depth"],
            "patch_size": made["vision"]["patch_size"],
            "image_size": made["image_size"],
        },
        "text": {
            name: made["text"][name]
            for name in (
                *("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"),
            )
        },
    }
    for part, settings in (("text", text), ("vision", vision)):
        for name, value in found[part].items():
            if settings[name] != value:
                said = shown(settings[name])
                raise BundleError(f"{path} says {part} {name} {said} and the weights have {value}; restore the model.")


def state(directory: Path) -> dict[str, Tensor]:
    """All weights, by LAVIS's names; on disk until they are used.

    Raises:
        BundleError: a file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(directory):
        for name, tensor in _tensors(path).items():
            if _name(name) in tensors:
                raise BundleError(f"{path} has the weight {name} for a second time; save the model anew.")
            tensors[_name(name)] = tensor
    words, head = "text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.decoder.weight"
    if head in tensors:  # one weight, which may have been saved under either name
        tensors.setdefault(words, tensors[head])
    return tensors


def _tensors(path: Path) -> dict[str, Tensor]:
    """What one file has, by its own names."""
    if path.suffix != ".safetensors":
        return read_checkpoint(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} is not a readable safetensors file ({error}); fetch it again.") from error


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights: one, or those that an index names.

    Raises:
        BundleError: there are none, or one that the index names is missing.
    """
    for name in WEIGHTS:
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return [directory / name]
        if index.is_file():
            parts = sorted(set(map(str, mapping(read(index).get("weight_map")).values())))
            for part in parts:
                if Path(part).name != part or not (directory / part).is_file():
                    raise BundleError(f"{directory / part} is missing, which {index.name} names; restore the model.")
            if parts:
                return [directory / part for part in parts]
    raise BundleError(f"{directory} has no {' and no '.join(WEIGHTS)}; give a directory with a model's weights.")


def _name(name: str) -> str:
    """LAVIS's name of a weight; that of the text parts is the same."""
    for theirs, ours in _NAMES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if found := _LAYER.fullmatch(name):
        inner = found[2]
        for theirs, ours in _IN_LAYER:
            inner = ours + inner.removeprefix(theirs) if inner.startswith(theirs) else inner
        return f"visual_encoder.blocks.{found[1]}.{inner}"
    return name
