"""The same logits from LAVIS with a checkpoint that its own loader read, and from ours with the fp32 bundle."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip.lavis import build, fill
from blip.weights.bundle import TASKS, open_bundle
from blip.weights.load import load_tokenizer


@torch.inference_mode()
def logits(task: str, net: Any, image_size: int) -> Tensor:
    """The logits of LAVIS's own modules for fixed inputs."""
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    if task == "match":
        samples = {"image": pixels, "text_input": ["a picture of the dog"]}
        return torch.cat([net(samples, match_head="itm").flatten(), net(samples, match_head="itc").flatten()])
    states = net.visual_encoder.forward_features(pixels)
    ids = torch.tensor([[net.tokenizer.bos_token_id, *range(2, 8)]])

    def run(module: Any, states: Tensor) -> Any:
        return module(
            ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:-1], dtype=torch.long),
            return_dict=True,
        )

    if task == "answer":
        states = run(net.text_encoder, states).last_hidden_state
    result: Tensor = run(net.text_decoder, states).logits
    return result


def differences(bundle_path: Path) -> Iterator[tuple[str, int, float]]:
    """For each task: how many logits were compared, and the largest difference.

    LAVIS finds its checkpoints and its vocabulary as benchmarks/stock_predict.py says.
    """
    from lavis.models import load_model

    bundle = open_bundle(bundle_path)
    names = {"caption": ("blip_caption", "base_coco"), "answer": ("blip_vqa", "vqav2")}
    names["match"] = ("blip_image_text_matching", "base")
    for task in TASKS:
        config = bundle.config(task)
        expected = logits(task, load_model(*names[task], is_eval=True, device="cpu"), config["image_size"])
        net = build(task, config, load_tokenizer(bundle, task))
        fill(net, bundle.tensors(task), torch.device("cpu"), torch.float32, where=task)
        found = logits(task, net.eval(), config["image_size"])
        yield task, expected.numel(), float((expected - found).abs().max())


if __name__ == "__main__":
    import sys

    for task, count, difference in differences(Path(sys.argv[1])):
        print(f"{task}: {count} logits, largest difference {difference}", flush=True)
