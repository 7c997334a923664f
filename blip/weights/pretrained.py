"""Upstream's published checkpoints -> a weights bundle: fetch, verify, strip, convert.

One process at a time works in a directory (file lock). Downloads and the bundle get their names when
they are complete and checked, so a run that is killed leaves nothing wrong, and the next one
continues where it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip.errors import BundleError
from blip.lavis import build as build_model
from blip.lavis import make_tokenizer
from blip.weights import published as lavis_names
from blip.weights.bundle import MANIFEST, BundleWriter, check_replaceable, open_bundle
from blip.weights.checkpoint import read_checkpoint
from blip.weights.download import File, Report, fetch, received, sized
from blip.weights.making import (
    DOWNLOADS,
    alone,
    check_room,
    describe,
    read_vocabulary,
    remove_downloads,
    stored_size,
    strip,
)

NAME = "pretrained"
MODEL_TYPES = {"caption": "base_coco", "answer": "vqav2", "match": "base"}


@dataclass(frozen=True)
class Upstream:
    """Where a bundle comes from: the vocabulary, and by task the checkpoint and its config.json."""

    vocabulary: File
    checkpoints: Mapping[str, File]
    configs: Mapping[str, Mapping[str, Any]]


def published() -> Upstream:
    """The checkpoints and dimensions that LAVIS's model configs name, or their copies on `BLIP_MIRROR`."""
    found = {task: lavis_names.checkpoint(task, model_type) for task, model_type in MODEL_TYPES.items()}
    files = {task: file for task, (file, _) in found.items()}
    return Upstream(lavis_names.vocabulary(), files, {task: config for task, (_, config) in found.items()})


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
    with alone(out, report) as place:
        downloads = place.parent / DOWNLOADS
        if not _is_built(place, dtype, report):
            _build(upstream, place, dtype, report, source, downloads)
            report(f"The bundle is ready: {out}.")
        if not keep and not (source and source.resolve() == downloads):
            files = (upstream.vocabulary, *upstream.checkpoints.values())
            remove_downloads(downloads / file.name for file in files)


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

    needed = sum(stored_size(net, dtype) for net in nets.values())
    files = upstream.checkpoints
    if source is None:
        files = {task: sized(file, downloads, report) for task, file in files.items()}
        needed += sum(file.size - received(file, downloads) for file in files.values() if file.size)
    check_room(out.parent, needed)

    checkpoints, origins = {}, []
    for task, file in files.items():
        path = file.check(source / file.name) if source else fetch(file, downloads, report)
        checkpoints[task] = path
        origins.append(describe(path))
    note = "BLIP's published checkpoints, without their training state."
    with BundleWriter(out, name=NAME, dtype=dtype, source=", ".join(origins), note=note) as writer:
        writer.vocabulary(read_vocabulary(vocabulary))
        for task, path in checkpoints.items():
            report(f"Converting {path.name} to {dtype}.")
            try:
                tensors = strip(nets[task], read_checkpoint(path), path, dtype)
            except BundleError:
                if source is None:
                    path.unlink()  # so that the next run fetches it again
                raise
            writer.model(task, upstream.configs[task], tensors)
            del tensors
