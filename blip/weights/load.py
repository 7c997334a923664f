"""A weights bundle -> LAVIS's models on the device."""

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from blip.engine import device_beam, kernels, precision
from blip.engine.beam import Search
from blip.engine.graphs import CudaRecorder, Recorder
from blip.engine.model import Model
from blip.errors import ConfigError
from blip.lavis import build, fill, make_tokenizer
from blip.weights.bundle import Bundle, understanding
from blip.weights.settings import check_numbers


def load_models(
    bundle: Bundle,
    device: torch.device,
    dtype: str,
    *,
    max_batch: int = 1,
    cuda_graphs: bool = False,
    pinned: str = "",
) -> dict[str, Model]:
    """Build the models of `bundle` on `device` in the precision `dtype`, keyed by task.

    On a GPU, works for batches of up to `max_batch` are captured and proven here, if `cuda_graphs`. On a CPU, the
    kernels that are not `pinned` (see `trial.pinned`) are chosen here, on the first model's shapes for all.

    Raises:
        BundleError: a model cannot do what its config says, a parameter is not in the bundle, has another shape, or a
            tensor is not used.
        ConfigError: `dtype` or a pinned kernel is not available on `device`.
    """
    with _refusals():
        precision.check(device, dtype)
    loaded = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    configs = {task: bundle.config(task) for task in bundle.tasks}
    tokenizers: dict[str, Any] = {}  # those that are the same are made once
    nets, searches = {}, {}
    for task, config in configs.items():
        key = f"{bundle.vocabulary(task)} {config.get('tokenizer')}"
        with understanding(bundle.path, task):
            tokenizers[key] = tokenizers.get(key) or load_tokenizer(bundle, task)
            check_numbers(task, config, tokenizers[key])
            nets[task] = build(task, config, tokenizers[key])
            searches[task] = None if task == "match" else Search.of(config)

    with _refusals():
        choice = precision.chosen(next(iter(nets.values())), device, dtype, pinned)

    def load(task: str) -> Model:
        weights = bundle.path / task / "model.safetensors"
        fill(nets[task], bundle.tensors(task), device, loaded, where=f"{weights}")
        config = configs[task]
        net = precision.prepare(nets[task], device, dtype, choice)
        return Model(net, device, config["image_size"], searches[task], config.get("library", "lavis"))

    with ThreadPoolExecutor(2) as pool:  # reading and converting weights keeps one core busy each
        models = dict(zip(configs, pool.map(load, configs), strict=True))
    if device.type == "cpu":
        kernels.keep_memory()  # from now on: what loading needed has gone back
    elif cuda_graphs:
        models = with_graphs(models, max_batch, CudaRecorder())
    return models


@contextmanager
def _refusals() -> Iterator[None]:
    """Make a refusal of the engine's an error of the settings."""
    try:
        yield
    except kernels.PrecisionError as error:
        raise ConfigError(str(error)) from error


def with_graphs(
    models: dict[str, Model],
    max_batch: int,
    record: Recorder,
    agrees: Callable[[torch.device, Search], bool] = device_beam.agrees,
) -> dict[str, Model]:
    """The models with works for batches of up to `max_batch` recorded, where the search on the device `agrees`."""
    searches = {(model.device, model.search) for model in models.values() if model.search}
    try:
        agreed = all(agrees(*search) for search in searches)
        refusal = "" if agreed else "the search on this device chooses other words"
    except RuntimeError as error:
        refusal = str(error).partition("\n")[0]
    if refusal:
        print(f"Everything runs without CUDA graphs: {refusal}.", flush=True)
        return models
    largest_first = sorted(models, key=lambda task: models[task].image_size, reverse=True)  # others fit in its memory
    gc.collect()
    gc.freeze()  # every capture collects garbage, which takes long where there are this many objects
    try:
        recorded = {task: models[task].with_graphs(max_batch, record) for task in largest_first}
        return {task: recorded[task] for task in models}
    finally:
        gc.unfreeze()
        torch.cuda.empty_cache()  # what was used to record and to prove


def load_tokenizer(bundle: Bundle, task: str) -> Any:
    """The tokenizer of one task's model."""
    return make_tokenizer(bundle.vocabulary(task), bundle.config(task).get("tokenizer"))
