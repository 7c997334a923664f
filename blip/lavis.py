"""LAVIS's classes: imported without what BLIP does not use, built without initial values, filled by assignment.

LAVIS owns the models. Parameters are made on the meta device, so no time goes into values that are overwritten.
"""

import importlib.util
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blip.errors import BundleError


def make_tokenizer(vocabulary: Path, options: Mapping[str, Any] | None = None) -> Any:
    """The tokenizer as LAVIS's `BlipBase.init_tokenizer` makes it, from a vocabulary file.

    Args:
        vocabulary: one token a line.
        options: a bundle's "tokenizer", where the model is not LAVIS's. `bos_token` and `enc_token` are what a text of
            the decoder, and one about an image, begins with; `special_tokens` stand for themselves in a text,
            `unnamed_tokens` show in none; the others are BertTokenizer's.
    """
    from transformers import BertTokenizer

    if options is None:
        tokenizer = BertTokenizer(str(vocabulary))
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        tokenizer.enc_token_id = tokenizer.additional_special_tokens_ids[0]
        return tokenizer
    settings = dict(options)
    begins, looks = settings.pop("bos_token"), settings.pop("enc_token")
    special, unnamed = settings.pop("special_tokens"), settings.pop("unnamed_tokens")

    class WordPieces(BertTokenizer):
        """As transformers 5 has it: the tokenizers library takes a text apart, and does some letters differently."""

        def tokenize(self, text: str, **_: Any) -> list[str]:
            tokens: list[str] = parts.encode(text, add_special_tokens=False).tokens
            return tokens

    tokenizer = WordPieces(str(vocabulary), **settings)
    parts = _word_pieces(tokenizer.vocab, settings, special)
    tokenizer.add_special_tokens({"bos_token": begins, "additional_special_tokens": unnamed})
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids(looks)
    return tokenizer


def _word_pieces(ids: Mapping[str, int], options: Mapping[str, Any], special: Sequence[str]) -> Any:
    """As `BertTokenizer.__init__` of transformers 5.23 makes it."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    made = Tokenizer(WordPiece(dict(ids), unk_token="[UNK]"))
    made.normalizer = BertNormalizer(
        clean_text=True,
        handle_chinese_chars=options["tokenize_chinese_chars"],
        strip_accents=options["strip_accents"],
        lowercase=options["do_lower_case"],
    )
    made.pre_tokenizer = BertPreTokenizer()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return made


def prompt_tokens(prompt: str, tokenizer: Any) -> int:
    """How many tokens a caption begins with: the first one and the prompt's."""
    return len(tokenizer(prompt).input_ids) - 1  # without the end token


def pixel_values(config: Mapping[str, Any]) -> Tensor:
    """(3, 256) float32: what the model's own processor, after its resize, makes of each value of each colour."""
    if "pixels" in config:  # as transformers' TorchvisionBackend.rescale_and_normalize computes it
        scale = 1.0 / config["pixels"]["rescale_factor"]
        mean, std = (torch.tensor(config["pixels"][name])[:, None] * scale for name in ("mean", "std"))
        return torch.arange(256.0).expand(3, -1).clone().sub_(mean).div_(std)
    processor = import_lavis().blip_processors.BlipImageEvalProcessor().transform
    after_resize = type(processor)(processor.transforms[1:])
    values: Tensor = after_resize(torch.arange(256, dtype=torch.uint8)[:, None, None].expand(256, 1, 3).numpy())
    return values.squeeze(2)


def build(task: str, config: Mapping[str, Any], tokenizer: Any) -> Any:
    """The LAVIS model of `task` with every parameter on the meta device and buffers on the CPU.

    Besides LAVIS's own buffers it has `pixel_values`, which the engine looks the pixels of a picture up in.
    """
    net = _build(task, config, tokenizer)
    net.register_buffer("pixel_values", pixel_values(config), persistent=False)
    if config.get("library") == "transformers" and task == "caption":
        net.prompt_tokens = prompt_tokens(config["prompt"], tokenizer)
    return net


def _build(task: str, config: Mapping[str, Any], tokenizer: Any) -> Any:
    lavis = import_lavis()
    from transformers.models.bert.configuration_bert import BertConfig

    class WithTokenizer:
        @classmethod
        def init_tokenizer(cls) -> Any:
            return tokenizer  # LAVIS would ask the hub

    vision, text = dict(config["vision"]), BertConfig(**config["text"])
    norm = partial(nn.LayerNorm, eps=vision.pop("layer_norm_eps", 1e-6))  # LAVIS's
    with _MetaParameters():
        image_encoder = lavis.VisionTransformerEncoder(img_size=config["image_size"], norm_layer=norm, **vision)
        image_encoder.vision_width = vision["embed_dim"]
        if task == "caption":
            return type("BlipCaption", (WithTokenizer, lavis.BlipCaption), {})(
                image_encoder,
                lavis.XBertLMHeadDecoder(config=text),
                prompt=config["prompt"],
                max_txt_len=config["max_txt_len"],
            )
        encoder = lavis.XBertEncoder(config=text, add_pooling_layer=False)
        if task == "answer":
            # It attends to the question's states.
            decoder = lavis.XBertLMHeadDecoder(
                config=BertConfig(**{**config["text"], "encoder_width": text.hidden_size})
            )
            return type("BlipVQA", (WithTokenizer, lavis.BlipVQA), {})(
                image_encoder, encoder, decoder, max_txt_len=config["max_txt_len"]
            )
        return type("BlipITM", (WithTokenizer, lavis.BlipITM), {})(
            image_encoder, encoder, config["embed_dim"], max_txt_len=config["max_txt_len"]
        )


def interpolate_positions(positions: Tensor, net: Any) -> Tensor:
    """Position embeddings (1, 1 + patches, C) for the image size of `net`, by LAVIS's own function.

    What are no embeddings of a square image is returned as it is.
    """
    wanted = net.visual_encoder.pos_embed.shape
    if positions.ndim != 3 or positions.shape == wanted or positions.shape[::2] != wanted[::2]:
        return positions
    if math.isqrt(positions.shape[1] - 1) ** 2 != positions.shape[1] - 1:
        return positions
    import_lavis()
    interpolated: Tensor = sys.modules["lavis.models.vit"].interpolate_pos_embed(positions.float(), net.visual_encoder)
    return interpolated


def fill(net: nn.Module, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype, where: str) -> None:
    """Assign `tensors` to the parameters of `net`, converted to `dtype` on `device`; tied parameters stay tied.

    Raises:
        BundleError: naming `where` and the key, when the two sets of names or a shape differ.
    """
    wanted = dict(net.named_parameters())  # tied parameters once
    for name in wanted.keys() - tensors.keys():
        raise BundleError(f"{where} lacks the tensor {name}; restore the bundle.")
    for name in tensors.keys() - wanted.keys():
        raise BundleError(f"{where} holds the tensor {name}, which the model does not use; restore the bundle.")
    filled = {}
    for name, parameter in wanted.items():
        tensor = tensors.pop(name)  # free each source as soon as it is converted
        if tensor.shape != parameter.shape:
            shapes = f"{list(tensor.shape)} instead of {list(parameter.shape)}"
            raise BundleError(f"{where} has the tensor {name} with shape {shapes}; restore the bundle.")
        filled[id(parameter)] = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
    for name, parameter in list(net.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(owner), leaf, filled[id(parameter)])


_INITIALISERS = frozenset(("add_", "clamp_", "constant_", "erfinv_", "fill_", "kaiming_uniform_", "mul_", "normal_"))
_INITIALISERS |= {"trunc_normal_", "uniform_", "zero_"}


class _MetaParameters(TorchFunctionMode):
    """Allocates what modules allocate for parameters on the meta device, and does not initialise it.

    `torch.device("meta")` as a context would also catch arange and linspace, whose values LAVIS reads;
    and some initialisers, run on meta tensors, import torch's compiler (3 s).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs = {**kwargs, "device": "meta"}
        if func.__name__ in _INITIALISERS:
            target = args[0] if args else kwargs["tensor"]
            if target.is_meta:
                return target
        return func(*args, **kwargs)


def import_lavis() -> ModuleType:
    """The LAVIS classes that BLIP needs, as one namespace.

    Importing the package `lavis` itself loads every dataset, task and model it knows (10 s); its
    sub-modules need only the two base classes from it. Of torchvision they need the transforms, not
    the detection models, which import torch's compiler. So empty packages replace these `__init__` files
    unless the real ones are imported already. OpenCV and pandas are for parts that BLIP does not use, and
    not installed: during the import empty modules stand in for them.
    """
    bare = ("lavis", "lavis.models", "lavis.processors", "torchvision", "torchvision.datasets")
    for name in bare if "lavis" not in sys.modules else ():
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)  # not executed
    absent = [name for name in ("cv2", "pandas") if name not in sys.modules]
    sys.modules |= {name: ModuleType(name) for name in absent}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside fairscale and timm
        from lavis.models.base_model import BaseModel
        from lavis.processors.base_processor import BaseProcessor

        sys.modules["lavis.models"].BaseModel = BaseModel  # type: ignore[attr-defined]
        sys.modules["lavis.processors"].BaseProcessor = BaseProcessor  # type: ignore[attr-defined]
        from lavis.models.blip_models.blip_caption import BlipCaption
        from lavis.models.blip_models.blip_image_text_matching import BlipITM
        from lavis.models.blip_models.blip_vqa import BlipVQA
        from lavis.models.med import XBertEncoder, XBertLMHeadDecoder
        from lavis.models.vit import VisionTransformerEncoder
        from lavis.processors import blip_processors
    for name in absent:
        del sys.modules[name]

    namespace = ModuleType("blip_lavis")
    for item in (BlipCaption, BlipITM, BlipVQA, XBertEncoder, XBertLMHeadDecoder, VisionTransformerEncoder):
        setattr(namespace, item.__name__, item)
    namespace.blip_processors = blip_processors  # type: ignore[attr-defined]
    return namespace
