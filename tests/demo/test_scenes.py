"""Drawn scenes: the same seed draws the same one, and what is drawn can be seen."""

import math
import random

import numpy as np

from demo.scenes import COLOURS, MIN_CONTRAST, SHAPES, SIZES, draw, random_scene
from demo.sentences import caption

SEEDS = range(100)


def test_the_same_seed_draws_the_same_picture() -> None:
    for seed in SEEDS:
        one, other = random_scene(random.Random(seed)), random_scene(random.Random(seed))
        assert one == other
        assert draw(one).tobytes() == draw(other).tobytes(), seed


def test_the_scenes_of_a_seed_stay_what_they_are() -> None:
    """The kept weights were trained on scenes by their seeds, and tested on others."""
    assert [caption(random_scene(random.Random(f"test-{k}"))) for k in range(4)] == [
        "five small red triangles on a dark background",
        "a small blue star to the left of a large green star",
        "a small purple triangle on a light background",
        "two small green triangles on a light background",
    ]


def test_objects_lie_in_the_picture_and_do_not_touch() -> None:
    for seed in SEEDS:
        scene = random_scene(random.Random(seed))
        assert 1 <= len(scene.objects) <= 5
        for item in scene.objects:
            assert item.shape in SHAPES and item.colour in COLOURS and item.size in SIZES
            for centre, side in zip(item.centre, scene.canvas, strict=True):
                assert item.radius < centre < side - item.radius, seed
            for other in scene.objects:
                apart = max(abs(a - b) for a, b in zip(item.centre, other.centre, strict=True))
                assert other is item or apart > item.radius + other.radius, seed


def test_the_middle_of_every_object_has_its_colour() -> None:
    for seed in SEEDS:
        scene = random_scene(random.Random(seed))
        pixels = np.asarray(draw(scene), dtype=float)
        assert pixels.shape == (scene.canvas[1], scene.canvas[0], 3)
        for item in scene.objects:
            x, y = (int(place) for place in item.centre)
            assert math.dist(pixels[y, x], item.rgb) < MIN_CONTRAST / 2, seed  # JPEG changes colours a little
