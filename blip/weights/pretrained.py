"""Upstream's published checkpoints -> a weights bundle: fetch, verify, strip, convert.

One process at a time works in a directory (file lock). Downloads and the bundle get their names when
they are complete and checked, so a run that is killed leaves nothing wrong, and the next one
continues where it was.
"""

import fcntl
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from blip.errors import BundleError
from blip.lavis import build as build_model
from blip.lavis import make_tokenizer
from blip.weights.bundle import MANIFEST, BundleWriter, check_replaceable, digest, open_bundle, remove_leftovers
from blip.weights.checkpoint import read_checkpoint
from blip.weights.download import File, Report, fetch, received

NAME = "pretrained"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
DOWNLOADS = "blip-downloads"  # beside the bundle, removed when it is finished


@dataclass(frozen=True)
class Upstream:
    """Where a bundle comes from: the vocabulary, and by task the checkpoint and its config.json."""

    vocabulary: File
    checkpoints: Mapping[str, File]
    configs: Mapping[str, Mapping[str, Any]]


def published() -> Upstream:
    """The checkpoints and dimensions that LAVIS's model configs name, or their copies on `BLIP_MIRROR`.

    LAVIS's configs have no sizes. Those here are of the files that its URLs served; they reveal an error
    page or a replaced file. The SHA-256 of bert-base-uncased's vocabulary is well known.
    """
    spec = importlib.util.find_spec("lavis")
    assert spec is not None and spec.submodule_search_locations
    directory = Path(spec.submodule_search_locations[0]) / "configs" / "models"
    text = json.loads((directory / "med_config.json").read_text())
    for name in ("architectures", "model_type"):
        del text[name]
    vision = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}  # LAVIS's vit_type "base"
    # What the yaml files leave to the defaults of LAVIS's functions.
    defaults = {
        "caption": {"max_txt_len": 40, "num_beams": 3, "max_length": 30, "min_length": 10},
        "answer": {"max_txt_len": 35, "num_beams": 3, "max_length": 10, "min_length": 1},
        "match": {"max_txt_len": 35},
    }
    sources = {
        "caption": ("blip_caption_base_coco.yaml", 2_688_144_147),
        "answer": ("blip_vqav2.yaml", 1_446_244_375),
        "match": ("blip_itm_base.yaml", 1_908_759_703),
    }
    checkpoints, configs = {}, {}
    for task, (yaml_name, size) in sources.items():
        model = yaml.safe_load((directory / yaml_name).read_text())["model"]
        dimensions = {name: model[name] for name in ("image_size", "prompt", "embed_dim") if name in model}
        configs[task] = {**dimensions, **defaults[task], "vision": vision, "text": text}
        checkpoints[task] = File(_mirrored(model["finetuned"]), size)
    vocabulary = File(
        _mirrored("https://huggingface.co/bert-base-uncased/resolve/main/vocab.txt"),
        231_508,
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    )
    return Upstream(vocabulary, checkpoints, configs)


def _mirrored(url: str) -> str:
    mirror = os.environ.get("BLIP_MIRROR")
    return f"{mirror.rstrip('/')}/{url.rpartition('/')[2]}" if mirror else url


def ensure(path: Path, dtype: str, report: Report) -> None:
    """Build the pretrained bundle at `path` if there is none; leave an existing one as it is.

    Raises:
        BundleError: it cannot be built.
    """
    if not (path / MANIFEST).is_file():
        build(published(), path, dtype, report)


def build(
    upstream: Upstream, out: Path, dtype: str, report: Report, *, source: Path | None = None, keep: bool = False
) -> None:
    """Make `out` a whole and verified bundle of `upstream` in `dtype` ("float16" or "float32").

    Args:
        upstream: where the files come from.
        out: the bundle's directory; an existing pretrained bundle is verified, and replaced if it is
            damaged or of another dtype.
        dtype: what the weights are stored as.
        report: takes one line of progress at a time.
        source: a directory with the checkpoints, already downloaded; it is only read.
        keep: leave the downloads in `blip-downloads`, beside `out`.

    Raises:
        BundleError: one sentence on what is missing, damaged or full.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        downloads = out.parent / DOWNLOADS
        with _alone(out.parent, report):
            remove_leftovers(out)
            if not _is_built(out, dtype, report):
                _build(upstream, out, dtype, report, source, downloads)
            if not keep:
                shutil.rmtree(downloads, ignore_errors=True)
    except OSError as error:
        where = error.filename or out.parent
        raise BundleError(
            f"{where} cannot be written: {error.strerror or error}; make room or set its permissions and run again."
        ) from error


@contextmanager
def _alone(directory: Path, report: Report) -> Iterator[None]:
    with (directory / ".blip.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"Waiting for another process that builds a bundle in {directory}.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_built(out: Path, dtype: str, report: Report) -> bool:
    check_replaceable(out)
    if not (out / MANIFEST).is_file():
        return False
    try:
        bundle = open_bundle(out)
        bundle.verify()
    except BundleError as error:
        report(f"{error} Building the bundle again.")
        return False
    if bundle.name != NAME:
        raise BundleError(f"{out} holds the bundle {bundle.name!r}; remove it or choose another directory.")
    return bundle.dtype == dtype


def _build(upstream: Upstream, out: Path, dtype: str, report: Report, source: Path | None, downloads: Path) -> None:
    local = source and source / upstream.vocabulary.name
    if local and local.is_file():
        vocabulary = upstream.vocabulary.check(local)
    else:
        vocabulary = fetch(upstream.vocabulary, downloads, report)
    tokenizer = make_tokenizer(vocabulary)
    nets = {task: build_model(task, config, tokenizer) for task, config in upstream.configs.items()}

    parameters = sum(parameter.numel() for net in nets.values() for parameter in net.parameters())
    needed = parameters * DTYPES[dtype].itemsize
    if source is None:
        files = upstream.checkpoints.values()
        needed += sum(file.size - received(file, downloads) for file in files)
    free = shutil.disk_usage(out.parent).free
    if free < needed * 1.01:
        raise BundleError(
            f"{out.parent} has {free / 1e9:.2f} GB free and the bundle with its downloads needs "
            f"{needed / 1e9:.2f} GB; free space or choose another disk."
        )

    checkpoints, origins = {}, []
    for task, file in upstream.checkpoints.items():
        path = file.check(source / file.name) if source else fetch(file, downloads, report)
        checkpoints[task] = path
        origins.append(f"{file.name} {file.size} bytes sha256:{digest(path)}")
    note = "BLIP's published checkpoints, without their training state."
    with BundleWriter(out, name=NAME, dtype=dtype, source=", ".join(origins), note=note) as writer:
        writer.vocabulary(vocabulary.read_bytes().decode().removesuffix("\n").split("\n"))
        for task, path in checkpoints.items():
            report(f"Converting {path.name} to {dtype}.")
            try:
                tensors = strip(nets[task], path, DTYPES[dtype])
            except BundleError:
                if source is None:
                    path.unlink()  # so that the next run fetches it again
                raise
            writer.model(task, upstream.configs[task], tensors)
            del tensors
    report(f"The bundle is ready: {out}.")


def strip(net: nn.Module, path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters of `net` from the checkpoint at `path` in `dtype`, each tied one once; nothing else.

    Raises:
        BundleError: naming the file and the weight that is missing, misshapen, ambiguous or not finite.
    """
    state = read_checkpoint(path)
    names: dict[nn.Parameter, list[str]] = {}  # parameters compare by identity
    for name, parameter in net.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name in state.keys() - {name for tied in names.values() for name in tied}:
        del state[name]  # an old-format checkpoint is all in memory
    tensors = {}
    for parameter, (name, *others) in names.items():
        copies = [state.pop(copy) for copy in (name, *others) if copy in state]
        if not copies:
            raise BundleError(f"{path} lacks the weight {name}: it is not the checkpoint that belongs here.")
        tensor = copies[0]
        if tensor.shape != parameter.shape:
            shapes = f"{list(tensor.shape)} instead of {list(parameter.shape)}"
            raise BundleError(f"{path} has the weight {name} with shape {shapes}: it does not belong here.")
        if not all(torch.equal(tensor, copy) for copy in copies[1:]):
            raise BundleError(f"{path} has different values for {name} and {others[0]}, which are one weight.")
        tensors[name] = tensor.to(dtype)
        if not tensors[name].isfinite().all():
            raise BundleError(f"{path} has values in the weight {name} that {dtype} cannot hold; fetch it again.")
    return tensors
