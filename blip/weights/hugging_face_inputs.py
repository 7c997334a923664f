"""What a BLIP in the layout of Hugging Face's transformers is given: its pixels, its vocabulary and its tokenizer.

Names and meaning are those of transformers 5.23 (image_processing_backends.py, tokenization_utils_base.py,
tokenization_bert.py). What this release cannot follow is refused by name.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blip.errors import BundleError
from blip.weights.making import check_vocabulary, read_vocabulary
from blip.weights.values import array, is_number, is_place, mapping, number, read, read_if_there, shown

BICUBIC = 3  # of Pillow's Resampling
#: The files.
FILES = (
    *("processor_config.json", "preprocessor_config.json", "vocab.txt"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
#: What BlipImageProcessor does where nothing is said; the second part is all that can be followed.
_PIXELS = {
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],  # OPENAI_CLIP_MEAN
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_STEPS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_center_crop": False,
    "do_pad": False,
    "resample": BICUBIC,
}
#: The names of image processors that are this one; "Fast" is what transformers 4 called it.
_PROCESSORS = ("BlipImageProcessor", "BlipImageProcessorFast", "BlipFeatureExtractor")
_TOKENIZERS = ("BertTokenizer", "BertTokenizerFast", None)
#: BERT's tokens that stand for themselves in a text.
_SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
#: Tokens that LAVIS adds to BERT's.
_ADDED = ("[DEC]", "[ENC]")
#: How a tokenizer.json writes "[CLS] text [SEP]", of each kind of post-processor.
_FRAME = {"BertProcessing": ["[CLS]", "[SEP]"], "TemplateProcessing": ["[CLS]", "A", "[SEP]"]}


def pixels(directory: Path, image_size: int) -> dict[str, Any]:
    """How a bundle's config.json says what the model sees of a picture.

    Raises:
        BundleError: its processor makes something else of a picture than this release can.
    """
    path, found = _processor(directory)
    given = {**_PIXELS, **_STEPS, **found}
    kind = given.get("image_processor_type", given.get("feature_extractor_type", _PROCESSORS[0]))
    if kind not in _PROCESSORS:
        raise BundleError(f"{path} names the processor {shown(kind)}; only a BlipImageProcessor can be followed.")
    size = given.get("size", image_size)
    if isinstance(size, dict):
        size = [size.get("height"), size.get("width")]
    if size not in (image_size, [image_size, image_size]):
        raise BundleError(
            f"{path} has a size of {shown(given['size'])} and the model takes {image_size}; make them the same."
        )
    for name, usual in _STEPS.items():
        if given[name] != usual and (given[name] or usual):
            raise BundleError(f"{path} has {name} {shown(given[name])}; only {usual!r} can be followed.")
    for name in ("image_mean", "image_std"):
        values = array(given[name])
        if len(values) != 3 or not all(map(is_number, values)):
            raise BundleError(f"{path} has {name} {shown(given[name])}; three numbers are needed.")
    if 0 in given["image_std"]:
        raise BundleError(f"{path} has an image_std of 0; restore the model.")
    return {
        "mean": given["image_mean"],
        "std": given["image_std"],
        "rescale_factor": number(path, given, "rescale_factor"),
    }


def _processor(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The settings of the image processor and their file; transformers 5 writes them into the first of the two."""
    path = directory / "processor_config.json"
    given = read_if_there(path)
    if "image_processor" in given:
        if not isinstance(given["image_processor"], dict):
            raise BundleError(f"{path} has no settings in image_processor; restore the model.")
        return path, given["image_processor"]
    path = directory / "preprocessor_config.json"
    return path, read_if_there(path)


def vocabulary(directory: Path, size: int) -> tuple[list[str], int]:
    """The tokens by id, filled up to `size`, which is the model's; and how many of them have a name.

    transformers gives the decoder's first token an id behind the vocabulary and no name: it gets LAVIS's, "[DEC]".

    Raises:
        BundleError: there is none, or it is no WordPiece vocabulary, or has more tokens than the model.
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
    names = [token for token in _ADDED if token not in words]
    return [*words, *[*names, *(f"[unnamed {index}]" for index in range(missing))][:missing]], len(words)


def _words(path: Path) -> list[str]:
    """The tokens of a tokenizer.json, in the order of their ids."""
    given = read(path)
    model = mapping(given.get("model"))
    ids = mapping(model.get("vocab"))
    places = {value: word for word, value in ids.items() if isinstance(value, int) and not isinstance(value, bool)}
    for token in array(given.get("added_tokens")):
        content, place = mapping(token).get("content"), mapping(token).get("id")
        if content in _ADDED and isinstance(place, int) and place not in places:
            places[place] = content
    count = len(places)
    is_whole = bool(ids) and len(ids) <= count and sorted(places) == list(range(count))
    if model.get("type", "WordPiece") != "WordPiece" or not is_whole:
        raise BundleError(f"{path} has no WordPiece vocabulary, which a BLIP needs; give the model's own.")
    frame = mapping(given.get("post_processor"))
    if frame and _framed(frame) != _FRAME.get(str(frame.get("type"))):
        raise BundleError(f"{path} does not begin a text with [CLS] and end it with [SEP]; give the model's own.")
    return check_vocabulary(path, [places[place] for place in range(count)])


def _framed(given: Mapping[str, Any]) -> list[Any]:
    """What a post-processor makes of one text."""
    if given.get("type") == "BertProcessing":
        return [(array(given.get(name)) or [None])[0] for name in ("cls", "sep")]
    pieces = [mapping(mapping(piece).get(kind)) for piece in array(given.get("single")) for kind in mapping(piece)]
    return [piece.get("id") for piece in pieces]


def tokenizer(directory: Path, text: Mapping[str, Any], words: Sequence[str], named: int) -> dict[str, Any]:
    """What a tokenizer needs beside the vocabulary, and the tokens that texts begin with.

    Args:
        directory: the model's.
        text: its text_config.
        words: the tokens by id.
        named: how many of them are the vocabulary's.

    Raises:
        BundleError: its files tell of a tokenizer that this release does not have.
    """
    path, config = directory / "tokenizer_config.json", directory / "config.json"
    given = read_if_there(path)
    for name, token in (("sep_token_id", "[SEP]"), ("pad_token_id", "[PAD]")):
        if not is_place(text[name], len(words)) or words[text[name]] != token:
            raise BundleError(f"{config} has {name} {shown(text[name])}, which is not {token}'s; restore the model.")
    if not is_place(text["bos_token_id"], len(words)):
        place = text["bos_token_id"]
        raise BundleError(f"{config} has bos_token_id {shown(place)}, which is no token's; restore the model.")
    if given.get("tokenizer_class") not in _TOKENIZERS:
        kind = shown(given["tokenizer_class"])
        raise BundleError(f"{path} names the tokenizer {kind}; only a BertTokenizer can be followed.")
    if given.get("split_special_tokens"):
        raise BundleError(f"{path} has split_special_tokens, which this server cannot do; remove it.")
    options = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
    for name, usual in options.items():
        value = given.get(name, usual)
        if not isinstance(value, bool) and not (value is usual is None):
            raise BundleError(f"{path} has {name} {shown(value)}; true or false is needed.")
        options[name] = value
    possible = {token: words.index(token) for token in (*_SPECIAL.values(), *_ADDED) if token in words[:named]}
    special = possible.keys() & _SPECIAL.values()
    for where, purpose, content, place in _special_tokens(directory):
        is_known = isinstance(content, str) and content in possible and place in (None, possible[content])
        if not is_known or _SPECIAL.get(purpose or "", content) != content:
            what = f"the special token {shown(content)}" + (f" as {purpose}" if purpose in _SPECIAL else "")
            raise BundleError(f"{where} has {what}, which this server's tokenizer cannot have; give the model's own.")
        special.add(content)
    return {
        **options,
        "bos_token": words[text["bos_token_id"]],
        "enc_token": "[CLS]",
        "special_tokens": sorted(special, key=possible.__getitem__),
        "unnamed_tokens": list(words[named:]),
    }


def _special_tokens(directory: Path) -> Iterator[tuple[Path, str | None, Any, Any]]:
    """Each special or added token that a file tells of: the file, what it is for, how it is written, its id."""
    path = directory / "tokenizer.json"
    for token in array(read_if_there(path).get("added_tokens")):
        yield path, None, _content(token), mapping(token).get("id")
    path = directory / "added_tokens.json"
    for token, place in read_if_there(path).items():
        yield path, None, token, place
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        given = read_if_there(path)
        for purpose in given:
            if purpose.endswith("_token") and given[purpose] is not None:
                yield path, purpose, _content(given[purpose]), None
        for several in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
            tokens = given.get(several)
            for token in tokens.values() if isinstance(tokens, dict) else array(tokens):
                yield path, None, _content(token), None
        for place, token in mapping(given.get("added_tokens_decoder")).items():
            yield path, None, _content(token), int(place) if place.isdecimal() and len(place) < 10 else -1


def longest_text(directory: Path, positions: int) -> int:
    """How many tokens of a text its processor leaves, at most as many as the model has positions.

    transformers cuts texts where tokenizer.json was saved after texts had been cut or filled up to a length, which it
    does not do again, or where tokenizer_config.json says so.

    Raises:
        BundleError: it cuts or fills texts up in a way that this release cannot.
    """
    path = directory / "tokenizer_config.json"
    given, saved = read_if_there(path), read_if_there(directory / "tokenizer.json")
    baked, filled = mapping(saved.get("truncation")), mapping(mapping(saved.get("padding")).get("strategy"))
    if given.get("padding") not in (None, False, True, "longest", "do_not_pad"):
        raise BundleError(f"{path} has padding {shown(given['padding'])}, which this server cannot do; remove it.")
    limit = given.get("max_length", baked.get("max_length", filled.get("Fixed")))
    if limit is None and given.get("truncation"):
        limit = given.get("model_max_length")
    if limit is None:
        return positions
    side = given.get("truncation_side", baked.get("direction", "right"))
    how = given.get("truncation", True), str(side).lower()
    if how not in ((True, "right"), (None, "right"), ("longest_first", "right")):
        raise BundleError(f"{path} cuts texts by {shown(how)}, which this server cannot do; remove it.")
    if not isinstance(limit, int | float) or not limit >= 3:  # which a NaN is not
        raise BundleError(f"{path} has max_length {shown(limit)}; a number from 3 is needed.")
    return int(min(positions, limit))


def _content(token: Any) -> Any:
    """How a token is written, which stands by itself or in a description; the description where that says more."""
    if not isinstance(token, dict):
        return token
    is_plain = not any(token.get(name) for name in ("lstrip", "rstrip", "single_word", "normalized"))
    return token.get("content") if is_plain else token
