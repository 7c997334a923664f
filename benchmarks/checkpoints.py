"""Checkpoints with random weights in upstream's layout, at any size.

Each has every name that the published file has: tied weights under all their names, buffers, and
the training state that came along. The caption model has its optimiser, configuration and epoch
(LAVIS's trainer); the match model its momentum copy, queues and temperature (BLIP's retrieval).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip.lavis import build

QUEUE = 57_600  # samples in the queues of the published match checkpoint


def write_checkpoint(
    path: Path, task: str, config: Mapping[str, Any], tokenizer: Any, *, legacy: bool = False, queue: int = QUEUE
) -> dict[str, Tensor]:
    """Write one checkpoint and return the parameters that its model needs, fp32, by name.

    Args:
        path: the .pth file.
        task: caption, answer or match.
        config: the dimensions, as in a bundle's config.json.
        tokenizer: as blip.lavis.make_tokenizer makes it.
        legacy: torch.save's format before 1.6 instead of the zip format.
        queue: samples in the match model's queues.
    """
    net = build(task, config, tokenizer)
    generator = torch.Generator().manual_seed(len(task))
    values = {id(parameter): _random(name, parameter, generator) for name, parameter in net.named_parameters()}
    needed = {name: values[id(parameter)] for name, parameter in net.named_parameters()}
    state = {name: values[id(parameter)] for name, parameter in net.named_parameters(remove_duplicate=False)}
    state.update(net.named_buffers())
    content: dict[str, Any] = {"model": state}
    if task == "caption":
        moments = {
            index: {"step": 1, "exp_avg": value.clone(), "exp_avg_sq": value.square()}
            for index, value in enumerate(needed.values())
        }
        groups = [{"lr": 1e-5, "betas": (0.9, 0.999), "params": list(moments)}]
        content.update(
            optimizer={"state": moments, "param_groups": groups},
            config={"run": {"task": "captioning"}, "model": {"arch": "blip_caption"}},
            scaler=None,
            epoch=4,
        )
    if task == "match":
        for name, value in list(state.items()):
            module, dot, rest = name.partition(".")
            if module != "itm_head":
                state[f"{module}_m{dot}{rest}"] = value.clone()
        width = config["embed_dim"]
        state["image_queue"] = torch.randn(width, queue, generator=generator)
        state["text_queue"] = torch.randn(width, queue, generator=generator)
        state["idx_queue"] = torch.full((1, queue), -100)
        state["ptr_queue"] = torch.zeros(1, dtype=torch.long)
        state["temp"] = torch.tensor(0.07)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return needed


def _random(name: str, parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    """Values of the size that training leaves: small weights, norms near one."""
    value = torch.randn(parameter.shape, generator=generator) * 0.02
    return value + 1 if name.endswith("weight") and parameter.ndim == 1 else value
