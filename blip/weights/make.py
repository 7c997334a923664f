"""Any BLIP -> a weights bundle, with one task or several; and a bundle with other settings.

One process at a time works in a directory. A bundle gets its name when it is complete, so one that is killed leaves
nothing wrong, and the next one continues where it was.
"""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blip.errors import BundleError
from blip.lavis import build, make_tokenizer
from blip.weights.bundle import (
    CONFIG,
    MANIFEST,
    VOCABULARY,
    Bundle,
    BundleWriter,
    check_replaceable,
    open_bundle,
    temporary_prefix,
    understanding,
)
from blip.weights.download import Report
from blip.weights.load import load_tokenizer
from blip.weights.making import DOWNLOADS, alone, check_room, remove_downloads, stored_size, strip
from blip.weights.settings import changed, checked, usual_length
from blip.weights.shapes import LARGEST_IMAGE, left_over
from blip.weights.sources import Model, Source

NAME = "made"


def make(
    out: Path,
    sources: Mapping[str, Source],
    dtype: str,
    report: Report,
    *,
    image_size: int | None = None,
    keep: bool = False,
) -> None:
    """Make `out` a bundle of `sources`, by task, in `dtype` ("float16" or "float32").

    A whole bundle of the same sources that is there already is left as it is.

    Args:
        out: the bundle's directory.
        sources: at least one.
        dtype: what the weights are stored as.
        report: takes one line of progress at a time.
        image_size: pixels a side; None for that of each source.
        keep: leave the downloads in `blip-downloads`, beside `out`.

    Raises:
        BundleError: one sentence on what does not fit, is missing, damaged or full.
    """
    recipe = {task: source.recipe() for task, source in sources.items()}
    if image_size is not None:
        recipe = {task: f"{text}, images of {image_size} pixels" for task, text in recipe.items()}
    with alone(out, report) as place:
        downloads = place.parent / DOWNLOADS
        if not _is_made(place, recipe, dtype, report):
            models = {task: _sized(source.open(downloads, report), image_size) for task, source in sources.items()}
            nets = {task: _net(place, task, model) for task, model in models.items()}
            needed = sum(stored_size(net, dtype) for net in nets.values())
            check_room(place.parent, needed + sum(source.missing_bytes(downloads) for source in sources.values()))
            _write(place, sources, models, nets, dtype, recipe, downloads, report)
        if not keep:  # also what a run left that was killed when the bundle was there
            remove_downloads(path for source in sources.values() for path in source.downloaded(downloads))
        report(f"The bundle is ready: {out}.")


def change(path: Path, given: Iterable[str], report: Report) -> Bundle:
    """Change settings of the bundle at `path`, each as `caption.num_beams=5`; all of them, or none.

    Raises:
        BundleError: a setting is unknown or beyond what the model can do, or the bundle cannot be written.
    """
    with alone(path, report) as place:
        bundle = open_bundle(place)
        bundle.verify()
        for difference in bundle.unknown():
            raise BundleError(f"{difference} and would be lost; move it away and run again.")
        configs = {task: bundle.config(task) for task in bundle.tasks}
        changes = list(bundle.changes)
        for text in given:
            task, setting, value = changed(text, configs)
            configs[task][setting] = value
            changes = [line for line in changes if not line.startswith(f"{task}.{setting}=")]
            changes.append(f"{task}.{setting}=")
        for task, config in configs.items():
            with understanding(place, task):
                tokenizer = load_tokenizer(bundle, task)
                if not any(line.startswith(f"{task}.max_length=") for line in changes):
                    config = {**config, **usual_length(task, config, tokenizer)}
                configs[task] = checked(task, config, tokenizer)
        changes = [_with_value(line, configs) for line in changes]
        with BundleWriter(
            place,
            name=bundle.name,
            dtype=bundle.dtype,
            source=bundle.source,
            note=bundle.note,
            recipe=bundle.recipe,
            changes=changes,
        ) as writer:
            for name, entry in bundle.files.items():
                if name.endswith(CONFIG):
                    writer.config(name.partition("/")[0], configs[name.partition("/")[0]])
                else:
                    writer.link(name, place / name, entry)
    return open_bundle(place)


def _with_value(change: str, configs: Mapping[str, Mapping[str, Any]]) -> str:
    """A line of a manifest's changes with the value as it is now: a prompt, say, is written in the model's words."""
    name = change.partition("=")[0]
    task, _, setting = name.partition(".")
    return f"{name}={configs[task][setting]}" if setting in configs.get(task, ()) else change


def _is_made(out: Path, recipe: Mapping[str, str], dtype: str, report: Report) -> bool:
    check_replaceable(out)
    if not (out / MANIFEST).is_file():
        return False
    bundle = open_bundle(out)
    if (bundle.name, bundle.recipe, bundle.dtype) != (NAME, recipe, dtype):
        raise BundleError(f"{out} holds another bundle ({bundle.name}); remove it or choose another directory.")
    if bundle.changes:
        report(f"{out} has settings that were changed since: {', '.join(bundle.changes)}.")
    bundle.verify()
    return True


def _sized(model: Model, image_size: int | None) -> Model:
    """The model for images of another size."""
    if image_size is None:
        return model
    patch = model.config["vision"]["patch_size"]
    if image_size % patch or not patch <= image_size <= LARGEST_IMAGE:
        raise BundleError(
            f"--image-size {image_size} is not possible for {model.path}; use a multiple of {patch} up to "
            f"{LARGEST_IMAGE // patch * patch}."
        )
    return replace(model, config={**model.config, "image_size": image_size})


def _net(out: Path, task: str, model: Model) -> Any:
    """LAVIS's model without values; its settings have been checked."""
    with tempfile.TemporaryDirectory(prefix=temporary_prefix(out), dir=out.parent) as folder:
        path = Path(folder) / VOCABULARY
        path.write_text("".join(f"{token}\n" for token in model.vocabulary), encoding="utf-8")
        tokenizer = make_tokenizer(path, model.config.get("tokenizer"))
    checked(task, model.config, tokenizer)
    net = build(task, model.config, tokenizer)
    if not net.pixel_values.isfinite().all():
        raise BundleError(
            f"{model.path} has a rescale_factor, image_mean and image_std that make pixels of any size; restore them."
        )
    return net


def _write(
    out: Path,
    sources: Mapping[str, Source],
    models: Mapping[str, Model],
    nets: Mapping[str, nn.Module],
    dtype: str,
    recipe: Mapping[str, str],
    downloads: Path,
    report: Report,
) -> None:
    shared = next(iter(models.values())).vocabulary
    for source in sources.values():
        source.fetch(downloads, report)
    origins = "; ".join(f"{task}: {source.origin()}" for task, source in sources.items())
    note = f"Made for {', '.join(sources)} by python -m blip bundle make."
    with BundleWriter(out, name=NAME, dtype=dtype, source=origins, note=note, recipe=recipe) as writer:
        writer.vocabulary(shared)
        for task, model in models.items():
            report(f"Converting {model.path.name} to {dtype}.")
            if model.vocabulary != shared:
                writer.vocabulary(model.vocabulary, task)
            try:
                state = sources[task].state()
                _check_names(task, sources[task], nets[task], state, model.path, report)
                tensors = strip(nets[task], state, model.path, dtype)
            except BundleError:
                sources[task].discard()
                raise
            writer.model(task, model.config, tensors)
            del state, tensors


def _check_names(
    task: str, source: Source, net: nn.Module, state: Mapping[str, Tensor], path: Path, report: Report
) -> None:
    """Say which weights the model does not use, and refuse those that it should."""
    used = {name for name, _ in net.named_parameters(remove_duplicate=False)} | {
        name for name, _ in net.named_buffers()
    }
    unused = left_over(task, state, used, path, strict=not source.is_known)
    if unused:
        more = ", …" if len(unused) > 3 else ""
        report(f"{path.name}: left out {len(unused)} tensors of its training ({', '.join(unused[:3])}{more}).")
