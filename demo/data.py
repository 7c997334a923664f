"""The training scenes with their pictures and what each patch of these shows, and the order they come in."""

import multiprocessing
import random
from collections.abc import Iterator

import torch
from PIL import Image

from demo.bundle import GRID, IMAGE_SIZE
from demo.scenes import COLOURS, SHAPES, SIZES, Object, Scene, draw, random_scene
from demo.sentences import OPPOSITE, relation

BATCH = 64  # scenes
# What the linear heads read from each patch during training, with the number of classes: the object
# that covers the patch (0 is none), its place in the pair, the partner there, the group's count.
HEADS = {
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "size": 1 + len(SIZES),
    "place": len(OPPOSITE),
    "partner shape": len(SHAPES),
    "partner colour": len(COLOURS),
    "partner size": len(SIZES),
    "count": 5,
}
UNSAID = -100  # the class that cross_entropy ignores
NOTHING = [0, 0, 0] + [UNSAID] * (len(HEADS) - 3)


class Dataset:
    """Scenes with their resized pictures and, for each patch, what it shows."""

    def __init__(self, seed: int, count: int) -> None:
        self.scenes: list[Scene] = []
        self.pixels = torch.empty(count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
        self.owners = torch.empty(count, GRID * GRID, dtype=torch.uint8)
        self.facts = torch.zeros(count, 6, len(HEADS), dtype=torch.int8)
        self.extents = torch.zeros(count, 6, 4)
        names = [f"train-{seed}-{k}" for k in range(count)]
        with multiprocessing.get_context("fork").Pool(2) as pool:
            drawn = pool.imap(_draw, names, chunksize=100)
            for k, (scene, pixels) in enumerate(drawn):
                self.scenes.append(scene)
                picture = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
                self.pixels[k] = picture.view(IMAGE_SIZE, IMAGE_SIZE, 3).permute(2, 0, 1)
                self.owners[k] = torch.tensor(_owners(scene), dtype=torch.uint8)
                facts = [NOTHING, *(_facts(scene, item) for item in scene.objects)]
                self.facts[k, : len(facts)] = torch.tensor(facts, dtype=torch.int8)
                extents = [_extent(scene, item) for item in scene.objects]
                self.extents[k, 1 : len(facts)] = torch.tensor(extents)


def _draw(name: str) -> tuple[Scene, bytes]:
    """The scene of a seed and its pixels at the models' size."""
    scene = random_scene(random.Random(name))
    image = draw(scene).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return scene, image.tobytes()


def _extent(scene: Scene, item: Object) -> list[float]:
    """Centre x, y and half width, half height of an object, in patches."""
    halves = (item.radius, item.radius)
    return [GRID * v / side for pair in (item.centre, halves) for v, side in zip(pair, scene.canvas, strict=True)]


def _owners(scene: Scene) -> list[int]:
    """Which object each patch shows, row by row, counted from 1; 0 is none."""
    owners = [0] * (GRID * GRID)
    for number, item in enumerate(scene.objects, start=1):
        x, y, across, down = _extent(scene, item)
        for row in range(GRID):
            for column in range(GRID):
                width = min(x + across, column + 1) - max(x - across, column)
                height = min(y + down, row + 1) - max(y - down, row)
                central = int(x) == column and int(y) == row
                if central or (width > 0 and height > 0 and width * height > 0.25):
                    owners[row * GRID + column] = number
    return owners


def _facts(scene: Scene, item: Object) -> list[int]:
    """The classes of an object's patches, in the order of HEADS."""
    shapes, colours, places = list(SHAPES), list(COLOURS), list(OPPOSITE)
    look = [
        shapes.index(item.shape),
        colours.index(item.colour),
        SIZES.index(item.size),
    ]
    others = [other for other in scene.objects if (other.shape, other.colour) != (item.shape, item.colour)]
    pair = [UNSAID] * 4
    if others:
        other = others[0]
        pair = [
            places.index(relation(item, other)),
            shapes.index(other.shape),
            colours.index(other.colour),
            SIZES.index(other.size),
        ]
    return [1 + value for value in look] + pair + [len(scene.objects) - len(others) - 1]


def batches(count: int, steps: int, rng: random.Random) -> Iterator[list[int]]:
    """Scene numbers for each step: every scene once before any comes again."""
    order: list[int] = []
    for _ in range(steps):
        if len(order) < BATCH:
            order = rng.sample(range(count), count)
        yield [order.pop() for _ in range(BATCH)]
