"""The three LAVIS models with fresh weights."""

from typing import Any

import torch
from torch import Tensor, nn

from blip.lavis import build, fill
from demo.bundle import USE, VISION, config


def initial(net: nn.Module) -> dict[str, Tensor]:
    """Starting values for every parameter, as BERT and ViT start, scaled to narrow layers."""
    values = {}
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            values[name] = torch.zeros(parameter.shape)
        elif parameter.dim() == 1:
            values[name] = torch.ones(parameter.shape)
        else:
            values[name] = 0.05 * torch.randn(parameter.shape)
    return values


def new_nets(tokenizer: Any) -> dict[str, Any]:
    """The three LAVIS models with fresh weights, sharing one image encoder."""
    nets = {}
    for task in USE:
        nets[task] = build(task, config(task), tokenizer)
        fill(nets[task], initial(nets[task]), torch.device("cpu"), torch.float32, where=task)
        nets[task].requires_grad_(True)
        nets[task].visual_encoder = nets["caption"].visual_encoder
    return nets


@torch.no_grad()
def whiten(encoder: Any, pixels: Tensor) -> None:
    """Start the patch embedding as the principal components of patches, scaled to equal variance.

    Random filters mostly see a patch's brightness; these show edges and corners from the start,
    which saves much training.  `pixels` is (pictures, 3, height, width), normalised.
    """
    size, width = VISION["patch_size"], VISION["embed_dim"]
    patches = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    mean = patches.mean(0)
    centred = patches - mean
    variances, components = torch.linalg.eigh(centred.T @ centred / len(centred))
    scale = variances[-width:].sqrt() + 0.3  # the rarest components are noise and stay small
    filters = (components[:, -width:] / scale).T
    projection = encoder.patch_embed.proj
    projection.weight.copy_(filters.view_as(projection.weight))
    projection.bias.copy_(-filters @ mean)
    encoder.pos_embed.copy_(0.3 * torch.randn(encoder.pos_embed.shape))
