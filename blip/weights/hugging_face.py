"""A BLIP in the layout of Hugging Face's transformers: its config, processor, vocabulary and weights, as LAVIS's.

The names and the meaning of the settings are those of transformers 5.23 (configuration_blip.py, modeling_blip.py,
image_processing_backends.py). What this release cannot follow is refused by name.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip.errors import BundleError
from blip.weights.bundle import read_json
from blip.weights.checkpoint import read_checkpoint
from blip.weights.making import check_vocabulary, read_vocabulary
from blip.weights.shapes import Shapes, dimensions

ARCHITECTURES = {
    "caption": "BlipForConditionalGeneration",
    "answer": "BlipForQuestionAnswering",
    "match": "BlipForImageTextRetrieval",
}
LARGEST = 1e30  # of any number that a setting may have
BICUBIC = 3  # of Pillow's Resampling
#: The files that make a model, as patterns; of weights safetensors come first.
FILES = ("config.json", "preprocessor_config.json", "tokenizer*.json", "vocab.txt")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
#: Defaults of BlipTextConfig, BlipVisionConfig and BlipImageProcessor.
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
_PIXELS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": BICUBIC,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],  # OPENAI_CLIP_MEAN
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
#: What generate does where nothing is said: 20 tokens after the first. And what must not be asked for, since this
#: release has no such search.
_SEARCH = {"num_beams": 1, "min_length": 0, "max_length": 21}
_OTHER_SEARCHES = {
    "do_sample": False,
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "num_return_sequences": 1,
    "remove_invalid_values": False,
    **dict.fromkeys(
        (
            *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "force_words_ids"),
            *("forced_bos_token_id", "forced_eos_token_id", "max_new_tokens", "min_new_tokens", "max_time"),
            *("penalty_alpha", "exponential_decay_length_penalty", "guidance_scale", "stop_strings", "constraints"),
            *("watermarking_config", "dola_layers", "prompt_lookup_num_tokens"),
        )
    ),
}
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
    given = _read(path)
    if given.get("model_type") != "blip":
        raise BundleError(f"{path} is of a {given.get('model_type')!r} model and not of a BLIP; give a BLIP.")
    architecture = (_list(given.get("architectures")) or [ARCHITECTURES[task]])[0]
    if architecture != ARCHITECTURES[task]:
        right = next((name for name, known in ARCHITECTURES.items() if known == architecture), None)
        fix = f"give it with --{right}" if right else f"give one of {', '.join(ARCHITECTURES.values())}"
        raise BundleError(f"{path} is of a {architecture!r}; {fix}.")


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
    given = _read(path)
    text = {**_TEXT, **_mapping(given.get("text_config"))}
    vision = {**_VISION, **_mapping(given.get("vision_config"))}
    parts = {"text": text, "vision": vision}
    for part, values in parts.items():
        if values["hidden_act"] != "gelu":
            raise BundleError(f"{path} has a {part} hidden_act of {values['hidden_act']!r}; only 'gelu' is known.")
    heads = {part: _count(path, values, "num_attention_heads") for part, values in parts.items()}
    made = dimensions(task, shapes, directory, heads)
    _check_fit(path, made, text, vision)
    words = _vocabulary(directory, made["text"]["vocab_size"])
    made["text"] |= {"layer_norm_eps": _number(path, text, "layer_norm_eps"), "pad_token_id": text["pad_token_id"]}
    made["vision"]["layer_norm_eps"] = _number(path, vision, "layer_norm_eps")
    search = {} if task == "match" else _search(path, text)
    prompt = {"prompt": ""} if task == "caption" else {}
    config = {
        "library": "transformers",
        **made,
        "pixels": _pixels(directory, made["image_size"]),
        "tokenizer": _tokenizer(directory, text, words),
        "max_txt_len": made["text"]["max_position_embeddings"],
        **prompt,
        **search,
    }
    return config, words


def _check_fit(path: Path, made: Mapping[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    ratio = made["vision"].get("mlp_ratio", 4)
    found = {
        "vision": {
            "hidden_size": made["vision"]["embed_dim"],
            "intermediate_size": made["vision"]["embed_dim"] * ratio,
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
                raise BundleError(
                    f"{path} says {part} {name} {settings[name]!r} and the weights have {value}; restore the model."
                )


def _search(path: Path, text: Mapping[str, Any]) -> dict[str, int]:
    """Beams and lengths of the decoder, for which transformers does not read generation_config.json."""
    for name, usual in _OTHER_SEARCHES.items():
        if text.get(name, usual) not in (usual, None):
            raise BundleError(f"{path} asks for {name} {text[name]!r}, which this server cannot do; remove it.")
    search = {name: text[name] if text.get(name) is not None else usual for name, usual in _SEARCH.items()}
    for name in search:
        if name != "min_length" or search[name] != 0:
            _count(path, search, name)
    return search


def _pixels(directory: Path, image_size: int) -> dict[str, Any]:
    path = directory / "preprocessor_config.json"
    given = {**_PIXELS, **(_read(path) if path.is_file() else {})}
    size = given.get("size", image_size)
    if isinstance(size, dict):
        size = [size.get("height"), size.get("width")]
    if size not in (image_size, [image_size, image_size]):
        raise BundleError(
            f"{path} has a size of {given['size']!r} and the model takes {image_size}; make them the same."
        )
    for name in ("do_resize", "do_rescale", "do_normalize", "resample"):
        if given[name] != _PIXELS[name]:
            raise BundleError(f"{path} has {name} {given[name]!r}; only {_PIXELS[name]!r} can be followed.")
    for name in ("image_mean", "image_std"):
        values = _list(given[name])
        if len(values) != 3 or not all(_is_number(value) for value in values):
            raise BundleError(f"{path} has {name} {given[name]!r}; three numbers are needed.")
    if 0 in given["image_std"]:
        raise BundleError(f"{path} has an image_std of 0; restore the model.")
    return {
        "mean": given["image_mean"],
        "std": given["image_std"],
        "rescale_factor": _number(path, given, "rescale_factor"),
    }


def _tokenizer(directory: Path, text: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """What a BertTokenizer needs beside the vocabulary, and the tokens that texts begin with."""
    path = directory / "tokenizer_config.json"
    given = _read(path) if path.is_file() else {}
    for name, token in (("sep_token_id", "[SEP]"), ("pad_token_id", "[PAD]")):
        if not _is_place(text[name], words) or words[text[name]] != token:
            raise BundleError(f"{directory / 'config.json'} has {name} {text[name]!r}, which is not {token}'s.")
    if not _is_place(text["bos_token_id"], words):
        raise BundleError(
            f"{directory / 'config.json'} has bos_token_id {text['bos_token_id']!r}, which is no token's."
        )
    options = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
    for name, usual in options.items():
        value = given.get(name, usual)
        if value not in (True, False, None):
            raise BundleError(f"{path} has {name} {value!r}; true or false is needed.")
        options[name] = value
    return {**options, "bos_token": words[text["bos_token_id"]], "enc_token": "[CLS]"}


def _vocabulary(directory: Path, size: int) -> list[str]:
    """The tokens by id, filled up to `size`, which is the model's.

    transformers gives the decoder's first token an id behind the vocabulary and no name: it gets LAVIS's, "[DEC]".
    """
    plain, whole = directory / "vocab.txt", directory / "tokenizer.json"
    if whole.is_file():  # transformers takes it first
        path, words = whole, _words(whole)
    elif plain.is_file():
        path, words = plain, read_vocabulary(plain)
    else:
        raise BundleError(f"{directory} has neither vocab.txt nor tokenizer.json; add the model's vocabulary.")
    if len(words) > size:
        raise BundleError(f"{path} has {len(words)} tokens and the model {size}; give the model's own vocabulary.")
    missing = size - len(words)
    names = ["[DEC]", "[ENC]"] if "[DEC]" not in words else []
    return [*words, *[*names, *(f"[unnamed {index}]" for index in range(missing))][:missing]]


def _words(path: Path) -> list[str]:
    """The tokens of a tokenizer.json, in the order of their ids."""
    given = _read(path)
    model = _mapping(given.get("model"))
    ids = _mapping(model.get("vocab"))
    places = {value: word for word, value in ids.items() if isinstance(value, int) and not isinstance(value, bool)}
    if model.get("type", "WordPiece") != "WordPiece" or sorted(places) != list(range(len(ids))):
        raise BundleError(f"{path} has no WordPiece vocabulary, which a BLIP needs; give the model's own.")
    for token in _list(given.get("added_tokens")):
        content = _mapping(token).get("content")
        if content not in (*ids, "[DEC]", "[ENC]"):
            raise BundleError(f"{path} has the added token {content!r}, which this server's tokenizer cannot have.")
    return check_vocabulary(path, [places[place] for place in range(len(ids))])


def state(directory: Path) -> dict[str, Tensor]:
    """All weights, by LAVIS's names; on disk until they are used.

    Raises:
        BundleError: a file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(directory):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    tensors |= {_name(name): file.get_tensor(name) for name in list(file.keys())}
            except SafetensorError as error:
                raise BundleError(f"{path} is not a readable safetensors file ({error}); fetch it again.") from error
        else:
            tensors |= {_name(name): tensor for name, tensor in read_checkpoint(path).items()}
    return tensors


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
            parts = sorted(set(map(str, _mapping(_read(index).get("weight_map")).values())))
            for part in parts:
                if Path(part).name != part or not (directory / part).is_file():
                    raise BundleError(f"{directory / part} is missing, which {index.name} names; restore the model.")
            if parts:
                return [directory / part for part in parts]
    raise BundleError(f"{directory} has no {' and no '.join(WEIGHTS)}; give a directory with a model's weights.")


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, "restore the model")


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


def _count(path: Path, settings: Mapping[str, Any], name: str) -> int:
    value = settings[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BundleError(f"{path} has {name} {value!r}; a whole number from 1 is needed.")
    return value


def _number(path: Path, settings: Mapping[str, Any], name: str) -> float:
    value = settings[name]
    if not _is_number(value) or value <= 0:
        raise BundleError(f"{path} has {name} {value!r}; a number above 0 is needed.")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _is_place(value: Any, words: Sequence[str]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(words)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
