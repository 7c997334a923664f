"""A weights bundle -> LAVIS's BLIP models on the device.

LAVIS owns the classes; here they are only built (with parameters on the meta device, so that
nothing is initialised only to be overwritten) and filled by assignment.
"""

import importlib.util
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blip import precision
from blip.bundle import TASKS, VOCABULARY, Bundle, BundleError
from blip.config import ConfigError
from blip.graphs import GraphedDecoder


@dataclass(frozen=True)
class Model:
    """One task's LAVIS model in eval mode on its device, with what its bundle says of its use."""

    net: Any  # BlipCaption, BlipVQA or BlipITM
    image_size: int  # pixels, square
    num_beams: int
    max_length: int  # tokens, the prompt counted
    min_length: int  # tokens, the prompt counted
    decoder: GraphedDecoder | None = None  # on a GPU, for the tasks that generate text

    @property
    def lengths(self) -> dict[str, Any]:
        """The search that the bundle asks for, as the engine's arguments."""
        return {"num_beams": self.num_beams, "min_length": self.min_length, "max_length": self.max_length}


def choose_device(name: str) -> torch.device:
    """The device for `name` ("auto", "cpu" or "cuda"), tried with a real allocation.

    "auto" falls back to the CPU and says so; "cuda" does not.

    Raises:
        ConfigError: "cuda" was asked for and does not work.
    """
    if name == "cpu":
        return torch.device("cpu")
    try:
        torch.ones(1, device="cuda")
        return torch.device("cuda")
    except (RuntimeError, AssertionError) as error:  # no driver, no device, or a torch built without CUDA
        reason = str(error).splitlines()[0]
        if name == "cuda":
            raise ConfigError(f"BLIP_DEVICE=cuda and CUDA does not work here: {reason}") from error
        print(f"CUDA does not work here, using the CPU: {reason}")
        return torch.device("cpu")


def load_models(
    bundle: Bundle, device: torch.device, dtype: str, *, max_batch: int = 1, cuda_graphs: bool = False
) -> dict[str, Model]:
    """Build the three models of `bundle` on `device` in the precision `dtype`, keyed by task.

    On a GPU the decoders are made here for batches of up to `max_batch`, their steps captured if `cuda_graphs`.

    Raises:
        BundleError: a parameter is not in the bundle, has another shape, or a tensor is not used.
        PrecisionError: `dtype` is not to be had on `device`.
    """
    precision.check(device, dtype)
    loaded = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    tokenizer = load_tokenizer(bundle)
    configs = {task: bundle.config(task) for task in TASKS}
    nets = {task: build(task, config, tokenizer) for task, config in configs.items()}

    def load(task: str) -> Model:
        weights = bundle.path / task / "model.safetensors"
        fill(nets[task], bundle.tensors(task), device, loaded, where=f"{weights}")
        config = configs[task]
        return Model(
            net=precision.prepare(nets[task], device, dtype),
            image_size=config["image_size"],
            num_beams=config.get("num_beams", 1),
            max_length=config.get("max_length", 0),
            min_length=config.get("min_length", 0),
        )

    with ThreadPoolExecutor(2) as pool:  # reading and converting weights keeps one core busy each
        models = dict(zip(TASKS, pool.map(load, TASKS), strict=True))
    if device.type == "cuda":
        for task in ("caption", "answer"):
            decoder = make_decoder(task, models[task], max_batch, capture=cuda_graphs)
            models[task] = replace(models[task], decoder=decoder)
    return models


def make_decoder(task: str, model: Model, max_batch: int, *, capture: bool) -> GraphedDecoder:
    """The decoder of a caption or answer model for batches of up to `max_batch`."""
    caption = task == "caption"
    return GraphedDecoder(
        model.net.text_decoder,
        max_batch=max_batch,
        states_length=model.net.visual_encoder.pos_embed.shape[1] if caption else model.net.max_txt_len,
        masked=not caption,
        num_beams=model.num_beams,
        prompt_length=model.net.prompt_length if caption else 1,
        max_length=model.max_length,
        capture=capture,
    )


def load_tokenizer(bundle: Bundle) -> Any:
    """The tokenizer for the bundle's vocabulary."""
    return make_tokenizer(bundle.path / VOCABULARY)


def make_tokenizer(vocabulary: Path) -> Any:
    """The tokenizer as LAVIS's `BlipBase.init_tokenizer` makes it, from a vocabulary file."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(str(vocabulary))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokenizer.enc_token_id = tokenizer.additional_special_tokens_ids[0]
    return tokenizer


def build(task: str, config: Mapping[str, Any], tokenizer: Any) -> Any:
    """The LAVIS model of `task` with every parameter on the meta device and buffers on the CPU."""
    lavis = import_lavis()
    from transformers.models.bert.configuration_bert import BertConfig

    class WithTokenizer:
        @classmethod
        def init_tokenizer(cls) -> Any:
            return tokenizer  # LAVIS would ask the hub

    vision, text = config["vision"], BertConfig(**config["text"])
    with _MetaParameters():
        image_encoder = lavis.VisionTransformerEncoder(img_size=config["image_size"], **vision)
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
            return type("BlipVQA", (WithTokenizer, lavis.BlipVQA), {})(
                image_encoder, encoder, lavis.XBertLMHeadDecoder(config=text), max_txt_len=config["max_txt_len"]
            )
        return type("BlipITM", (WithTokenizer, lavis.BlipITM), {})(
            image_encoder, encoder, config["embed_dim"], max_txt_len=config["max_txt_len"]
        )


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
        tensor = tensors.pop(name)  # let go of each source as soon as it is converted
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
    the detection models whose import brings in torch's compiler; of pandas nothing. So bare packages stand
    in for these `__init__` files, unless somebody has imported the real ones; pandas only meanwhile.
    """
    bare = ("lavis", "lavis.models", "lavis.processors", "torchvision", "pandas")
    for name in bare if "lavis" not in sys.modules else ():
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)  # not executed
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
    if not hasattr(sys.modules.get("pandas"), "DataFrame"):
        sys.modules.pop("pandas", None)

    namespace = ModuleType("blip_lavis")
    for item in (BlipCaption, BlipITM, BlipVQA, XBertEncoder, XBertLMHeadDecoder, VisionTransformerEncoder):
        setattr(namespace, item.__name__, item)
    namespace.blip_processors = blip_processors  # type: ignore[attr-defined]
    return namespace
