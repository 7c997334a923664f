"""Drawn scenes: what they hold, how they are drawn at random, and their pictures.

A scene is one object, a group of two to five equal objects, or a pair of different objects with a clear spatial
relation, on a plain, shaded, noisy or striped background. Lengths are in pixels, angles in degrees, colours in RGB.
"""

import colorsys
import io
import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]
Tone = Literal["light", "dark"]

SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
# Hue range in degrees, then saturation and value ranges.  They hold the colours that Pillow and CSS
# call by these names ("green" is (0, 128, 0), "orange" (255, 165, 0)) and leave gaps between them.
COLOURS = {
    "red": ((-12, 6), (0.75, 1.0), (0.7, 1.0)),
    "orange": ((24, 41), (0.8, 1.0), (0.9, 1.0)),
    "yellow": ((50, 64), (0.7, 1.0), (0.88, 1.0)),
    "green": ((95, 150), (0.6, 1.0), (0.4, 1.0)),
    "blue": ((208, 248), (0.65, 1.0), (0.5, 1.0)),
    "purple": ((268, 304), (0.6, 1.0), (0.42, 1.0)),
}

# Half the extent of an object as a share of the canvas's shorter side; the gap keeps sizes clear.
SMALL_RADIUS = (0.07, 0.115)
LARGE_RADIUS = (0.155, 0.43)

MIN_CONTRAST = 100.0  # Euclidean RGB distance of every object from its background


@dataclass(frozen=True)
class Object:
    """One drawn shape; `radius` is half the side of the upright box around it."""

    shape: str
    colour: str
    size: str
    rgb: Rgb
    centre: tuple[float, float]
    radius: float
    angle: float = 0.0


@dataclass(frozen=True)
class Background:
    """`style` is plain, gradient, noise or stripes, between the colours `first` and `second`."""

    tone: Tone
    style: str
    first: Rgb
    second: Rgb
    seed: int = 0


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn; `jpeg_quality` None means no lossy compression."""

    objects: tuple[Object, ...]
    background: Background
    canvas: tuple[int, int]
    jpeg_quality: int | None = None
    antialias: bool = True


def _outline(shape: str, angle: float) -> list[tuple[float, float]]:
    """Corners of a shape in the box [-1, 1] x [-1, 1], y pointing down, before rotation fits it."""
    if shape == "square":
        corners = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    elif shape == "triangle":
        corners = [(0.0, -0.93), (1.0, 0.87), (-1.0, 0.87)]
    else:
        corners = []
        for k in range(10):
            reach, turn = (1.0 if k % 2 == 0 else 0.42), math.pi * k / 5
            corners.append((reach * math.sin(turn), -reach * math.cos(turn)))
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in corners]


def _paint_object(image: Image.Image, item: Object, antialias: bool) -> None:
    scale = 4 if antialias else 1
    left, top = (math.floor(c - 1.3 * item.radius) for c in item.centre)
    side = math.ceil(2.6 * item.radius) + 1
    mask = Image.new("L", (side * scale, side * scale), 0)
    pen = ImageDraw.Draw(mask)
    x, y = (item.centre[0] - left) * scale, (item.centre[1] - top) * scale
    radius = item.radius * scale
    if item.shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        corners = _outline(item.shape, item.angle)
        pen.polygon([(x + radius * u, y + radius * v) for u, v in corners], fill=255)
    if antialias:
        mask = mask.reduce(scale)
    image.paste(item.rgb, (left, top), mask)


def _paint_background(background: Background, canvas: tuple[int, int]) -> Image.Image:
    if background.style == "plain":
        return Image.new("RGB", canvas, background.first)
    width, height = canvas
    rng = np.random.default_rng(background.seed)
    if background.style == "noise":
        share = rng.random((height, width), dtype=np.float32)
    else:
        turn = rng.uniform(0, 2 * math.pi)
        x = np.arange(width, dtype=np.float32) / width - 0.5
        y = np.arange(height, dtype=np.float32) / height - 0.5
        ramp = x[None, :] * math.cos(turn) + y[:, None] * math.sin(turn)
        if background.style == "gradient":
            share = np.clip(ramp / 1.4 + 0.5, 0, 1)
        else:
            share = (np.floor(ramp * rng.uniform(6, 24)) % 2).astype(np.float32)
    first, second = (np.array(c, dtype=np.float32) for c in (background.first, background.second))
    pixels = first + share[:, :, None] * (second - first)
    return Image.fromarray(pixels.astype(np.uint8), "RGB")


def draw(scene: Scene) -> Image.Image:
    """The scene's picture (RGB), with its JPEG loss already in the pixels."""
    image = _paint_background(scene.background, scene.canvas)
    for item in scene.objects:
        _paint_object(image, item, scene.antialias)
    if scene.jpeg_quality is None:
        return image
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=scene.jpeg_quality)
    return Image.open(buffer).convert("RGB")


def _hsv(hue: float, saturation: float, value: float) -> Rgb:
    red, green, blue = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _random_background(rng: random.Random) -> Background:
    tone: Tone = "light" if rng.random() < 0.6 else "dark"

    def shade() -> Rgb:
        if tone == "light":
            grey, tint = rng.uniform(0.74, 1.0), rng.uniform(0.03, 0.28)
            return _hsv(rng.uniform(0, 360), tint if rng.random() < 0.5 else 0.0, grey)
        grey, tint = rng.uniform(0.0, 0.34), rng.uniform(0.1, 0.8)
        return _hsv(rng.uniform(0, 360), tint if rng.random() < 0.4 else 0.0, grey)

    style = rng.choices(("plain", "gradient", "noise", "stripes"), (60, 14, 13, 13))[0]
    pure: Rgb = (255, 255, 255) if tone == "light" else (0, 0, 0)
    first = pure if rng.random() < 0.4 else shade()
    return Background(tone, style, first, shade(), rng.randrange(2**32))


def _random_rgb(colour: str, background: Background, rng: random.Random) -> Rgb | None:
    """A shade of `colour` that stands out from the background, or None where none was found."""
    behind = [background.first]
    if background.style != "plain":
        behind.append(background.second)
    for _ in range(20):
        rgb = _hsv(*(rng.uniform(*limits) for limits in COLOURS[colour]))
        if all(math.dist(rgb, other) >= MIN_CONTRAST for other in behind):
            return rgb
    return None


def _random_radius(size: str, count: int, short: int, rng: random.Random) -> float:
    low, high = SMALL_RADIUS if size == "small" else LARGE_RADIUS
    if size == "large" and count > 1:
        high = 0.32 if count == 2 else 0.22
    return rng.uniform(low, high) * short


def _random_angle(shape: str, rng: random.Random) -> float:
    return 0.0 if shape == "circle" or rng.random() < 0.6 else rng.uniform(-10, 10)


def _grid_centres(
    count: int, radius: float, canvas: tuple[int, int], rng: random.Random
) -> list[tuple[float, float]] | None:
    """Centres in distinct cells of a random grid, so that no two objects touch; None if too tight.

    Some scenes get no jitter at all: people who draw by hand like even rows and centred objects.
    """
    columns = rng.randint(1, count)
    rows = math.ceil(count / columns) if rng.random() < 0.5 else rng.randint(1, count)
    if columns * rows < count:
        return None
    width, height = canvas[0] / columns, canvas[1] / rows
    slack_x, slack_y = width / 2 - 1.12 * radius - 1, height / 2 - 1.12 * radius - 1
    if min(slack_x, slack_y) < 0:
        return None
    cells = [(i, j) for j in range(rows) for i in range(columns)]
    tidy = rng.random() < 0.3
    chosen = cells[:count] if tidy else rng.sample(cells, count)
    jitter = 0.0 if tidy else 1.0
    return [
        (
            (i + 0.5) * width + jitter * rng.uniform(-slack_x, slack_x),
            (j + 0.5) * height + jitter * rng.uniform(-slack_y, slack_y),
        )
        for i, j in chosen
    ]


def _pair_centres(
    radii: tuple[float, float], axis: int, canvas: tuple[int, int], rng: random.Random
) -> list[tuple[float, float]] | None:
    """Centres of two separate objects, clearly further apart along `axis` (0 is x, 1 is y).

    "Clearly" holds in pixels and in shares of the canvas, since models see the picture squashed.
    """
    margins = [1.12 * r + 1 for r in radii]
    if any(2 * m > min(canvas) for m in margins):
        return None
    level = rng.random() < 0.3
    for _ in range(30):
        spots = [[rng.uniform(m, side - m) for side in canvas] for m in margins]
        if level:
            for spot in spots:
                spot[1 - axis] = canvas[1 - axis] / 2
        along = abs(spots[0][axis] - spots[1][axis])
        across = abs(spots[0][1 - axis] - spots[1][1 - axis])
        share = canvas[axis] / canvas[1 - axis]
        if along > sum(margins) and along > 1.5 * across * max(1.0, share):
            return [(x, y) for x, y in spots]
    return None


def _random_look(rng: random.Random) -> tuple[str, str, str]:
    return rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(SIZES)


def random_scene(rng: random.Random) -> Scene:
    """A scene of the grammar: 30 % single objects, 30 % groups, 40 % pairs."""
    kind = rng.choices(("single", "group", "pair"), (30, 30, 40))[0]
    count = {"single": 1, "group": rng.randint(2, 5), "pair": 2}[kind]
    looks = [_random_look(rng)]
    while kind == "pair" and len(looks) < 2:
        look = _random_look(rng)
        if look[:2] != looks[0][:2]:
            looks.append(look)
    axis = rng.randrange(2)
    # What is shown is settled; canvas, background and places are drawn again until all fits, so
    # that hard layouts (five large objects) come as often as easy ones.
    while True:
        short = rng.choice((rng.randint(96, 256), rng.randint(200, 480)))
        aspect = rng.choice((1.0, 4 / 3, 4 / 3, rng.uniform(1.0, 4 / 3), rng.uniform(1.0, 16 / 9)))
        long = min(round(short * aspect), 640)
        canvas = (short, long) if rng.random() < 0.3 else (long, short)
        background = _random_background(rng)
        shades = [_random_rgb(colour, background, rng) for _, colour, _ in looks]
        radii = [_random_radius(size, count, short, rng) for _, _, size in looks]
        if kind == "pair":
            centres = _pair_centres((radii[0], radii[1]), axis, canvas, rng)
        else:
            centres = _grid_centres(count, radii[0], canvas, rng)
        if centres is None or None in shades:
            continue
        items = []
        for k, centre in enumerate(centres):
            shape, colour, size = looks[k % len(looks)]
            rgb, radius = shades[k % len(looks)], radii[k % len(looks)]
            assert rgb is not None
            angle = _random_angle(shape, rng)
            items.append(Object(shape, colour, size, rgb, centre, radius, angle))
        quality = rng.randint(40, 95) if rng.random() < 0.75 else None
        return Scene(tuple(items), background, canvas, quality, rng.random() < 0.6)
