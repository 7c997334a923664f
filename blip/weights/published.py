"""The checkpoints that LAVIS names: their addresses and dimensions, from its own model configs."""

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from blip.weights.download import File

#: For each task what LAVIS calls the model, and the config of each of its model types.
MODELS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "caption": (
        "blip_caption",
        {"base_coco": "blip_caption_base_coco.yaml", "large_coco": "blip_caption_large_coco.yaml"},
    ),
    "answer": (
        "blip_vqa",
        {"vqav2": "blip_vqav2.yaml", "okvqa": "blip_vqa_okvqa.yaml", "aokvqa": "blip_vqa_aokvqa.yaml"},
    ),
    "match": ("blip_image_text_matching", {"base": "blip_itm_base.yaml", "large": "blip_itm_large.yaml"}),
}
#: LAVIS's configs have no sizes. These are of the files that its URLs served, in bytes; they reveal an error page or a
#: replaced file. The others are as long as their server says.
SIZES = {
    "blip_coco_caption_base.pth": 2_688_144_147,
    "model_base_vqa_capfilt_large.pth": 1_446_244_375,
    "model_base_retrieval_coco.pth": 1_908_759_703,
}
#: What the yaml files leave to the defaults of LAVIS's functions.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "caption": {"prompt": "a picture of ", "max_txt_len": 40, "num_beams": 3, "max_length": 30, "min_length": 10},
    "answer": {"max_txt_len": 35, "num_beams": 3, "max_length": 10, "min_length": 1},
    "match": {"max_txt_len": 35},
}
#: LAVIS's vit_type.
VISION = {
    "base": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def checkpoint(task: str, model_type: str) -> tuple[File, dict[str, Any]]:
    """The checkpoint of LAVIS's model of that type, or its copy on `BLIP_MIRROR`, and its config.json."""
    spec = importlib.util.find_spec("lavis")
    assert spec is not None and spec.submodule_search_locations
    directory = Path(spec.submodule_search_locations[0]) / "configs" / "models"
    model = yaml.safe_load((directory / MODELS[task][1][model_type]).read_text())["model"]
    text = json.loads((directory / Path(model["med_config_path"]).name).read_text())
    for name in ("architectures", "model_type"):
        del text[name]
    dimensions = {name: model[name] for name in ("image_size", "prompt", "embed_dim") if name in model}
    config = {**DEFAULTS[task], **dimensions, "vision": VISION[model["vit_type"]], "text": text}
    url = mirrored(model["finetuned"])
    return File(url, SIZES.get(url.rpartition("/")[2])), config


def vocabulary() -> File:
    """The vocabulary of bert-base-uncased, which every BLIP of LAVIS has; its SHA-256 is well known."""
    return File(
        mirrored("https://huggingface.co/bert-base-uncased/resolve/main/vocab.txt"),
        231_508,
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    )


def mirrored(url: str) -> str:
    """The address of the file on `BLIP_MIRROR`, if that is set."""
    mirror = os.environ.get("BLIP_MIRROR")
    return f"{mirror.rstrip('/')}/{url.rpartition('/')[2]}" if mirror else url
