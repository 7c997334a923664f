"""Train the demo bundle: small BLIP models of the three kinds on scenes that are drawn for it.

    scripts/train_demo [--out weights/demo] [--seed 0] [--steps N]
    scripts/train_demo --evaluate weights/demo

The three models are LAVIS's classes with small dimensions. They are trained together around one image encoder, which
each gets a copy of in the bundle, because encoding is most of the work. Extra linear heads tell the encoder what each
patch shows while it trains; they are dropped afterwards. The same seed and steps on the same kind of processor give the
same bytes.
"""

import argparse
import importlib
import math
import multiprocessing
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from blip.config import DEMO
from blip.engine.beam import Search
from blip.engine.model import Model
from blip.lavis import import_lavis
from blip.weights.bundle import open_bundle
from blip.weights.load import load_models
from demo.bundle import IMAGE_SIZE, USE, VISION, new_tokenizer, write
from demo.data import BATCH, HEADS, Dataset, batches
from demo.evaluate import evaluate, report
from demo.losses import WEIGHTS, Losses
from demo.nets import new_nets, whiten
from demo.tokens import Words

SCENES = 64_000  # drawn once and seen several times, with other questions and statements each time
STEPS = 5_200
LOOKING_STEPS = 2_600  # at the start, when only the encoder and its extra heads learn
PEAK_RATE = 2e-3
WARM_UP = 100  # steps
TEST_SCENES = 600
PRINT_EVERY = 50  # steps
CHECK_SCENES, CHECK_EVERY = 60, 400  # the accuracy is printed on that many scenes; steps


def looking_steps(steps: int) -> int:
    """How many of the steps the encoder learns alone."""
    return min(LOOKING_STEPS, steps // 2)


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate: a plateau for the encoder alone, then half a cosine; each warms up."""
    alone = looking_steps(steps)
    if step < alone:
        return min(1.0, (step + 1) / WARM_UP)
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - alone) / (steps - alone))
    return 0.6 * cosine * min(1.0, (step - alone + 1) / WARM_UP)


def train(seed: int, steps: int) -> dict[str, Any]:
    """Draw the training scenes and train the three models on them.

    Two processes of one thread each take half of every batch: with matrices this small that is much faster than one
    process with two threads.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory guards against reading it before a write; nothing here does that, and it is slow.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    importlib.import_module("torch._dynamo")  # else the optimizer imports it in both processes, for seconds
    import_lavis()
    started = time.monotonic()
    data = Dataset(seed, min(SCENES, steps * BATCH))
    print(f"drew {len(data.scenes)} scenes in {time.monotonic() - started:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (seed, steps, data, f"file://{folder}/meeting")
        helper = multiprocessing.get_context("fork").Process(target=_train_half, args=(1, *arguments), daemon=True)
        helper.start()
        nets = _train_half(0, *arguments)
        helper.join()
    return nets


def _train_half(rank: int, seed: int, steps: int, data: Dataset, meeting: str) -> dict[str, Any]:
    """Train on every second scene of each batch; both ranks end with the same weights."""
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    torch.manual_seed(seed)
    rng = random.Random(f"text-{seed}-{rank}")
    tokenizer = new_tokenizer()
    nets = new_nets(tokenizer)
    heads = nn.Linear(VISION["embed_dim"], sum(HEADS.values()) + 4)
    losses = Losses(nets, heads, Words(tokenizer))
    parameters = list(nn.ModuleList([*nets.values(), heads]).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    normalize = import_lavis().blip_processors.BlipImageEvalProcessor(IMAGE_SIZE).normalize
    whiten(nets["caption"].visual_encoder, normalize(data.pixels[:1000].float() / 255))
    progress = _Progress(steps)
    order = random.Random(f"order-{seed}")
    for step, batch in enumerate(batches(len(data.scenes), steps, order), start=1):
        chosen = batch[rank::2]
        scenes = [data.scenes[k] for k in chosen]
        pixels = normalize(data.pixels[chosen].float() / 255)
        features = nets["caption"].visual_encoder.forward_features(pixels)
        parts = losses.looking(features, data.owners[chosen], data.facts[chosen], data.extents[chosen])
        if step > looking_steps(steps):
            parts["caption"] = losses.caption(features, scenes)
            parts["answer"] = losses.answer(features, scenes, rng)
            parts["decision"], parts["contrast"] = losses.match(features, scenes, rng)
        optimizer.zero_grad()
        torch.stack([WEIGHTS[name] * part for name, part in parts.items()]).sum().backward()
        _share_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if rank == 0:
            progress.add(step, parts)
        if rank == 0 and step % CHECK_EVERY == 0 and "caption" in parts:
            ready = {task: _as_model(task, net) for task, net in nets.items()}
            report(evaluate(ready, [f"check-{k}" for k in range(CHECK_SCENES)]))
    torch.distributed.destroy_process_group()
    return nets


class _Progress:
    """Prints the means of the losses now and then."""

    def __init__(self, steps: int) -> None:
        self._steps, self._started = steps, time.monotonic()
        self._seen: dict[str, list[float]] = defaultdict(list)

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        for name, loss in losses.items():
            self._seen[name].append(loss.item())
        if step % PRINT_EVERY and step != self._steps:
            return
        means = "  ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in self._seen.items())
        passed = time.monotonic() - self._started
        print(f"step {step}/{self._steps}  {passed:.0f} s  {step * BATCH / passed:.0f} scenes/s  {means}", flush=True)
        self._seen.clear()


def _share_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the two processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= 2
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _as_model(task: str, net: Any) -> Model:
    use = USE[task]
    search = Search.of(use) if "num_beams" in use else None
    return Model(net, torch.device("cpu"), IMAGE_SIZE, search)


def main() -> None:
    """Train, write and evaluate, or only evaluate."""
    parser = argparse.ArgumentParser(description="Train or evaluate the demo bundle.")
    parser.add_argument("--out", type=Path, default=DEMO)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="only print a bundle's accuracy")
    arguments = parser.parse_args()
    if arguments.evaluate is None:
        nets = train(arguments.seed, arguments.steps)
        write(nets, arguments.out, arguments.seed, arguments.steps)
    torch.set_num_threads(2)
    bundle = open_bundle(arguments.evaluate or arguments.out)
    models = load_models(bundle, torch.device("cpu"), "float32")
    report(evaluate(models, [f"test-{k}" for k in range(TEST_SCENES)]))


if __name__ == "__main__":
    main()
