"""Settings from the environment, read and validated once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blip.errors import ConfigError

DEMO = Path(__file__).resolve().parent.parent / "weights" / "demo"
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "float16", "bfloat16", "int8")


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    Attributes:
        weights: `BLIP_WEIGHTS`: "demo", "pretrained" or a bundle directory.
        cache: `BLIP_CACHE`: the directory that keeps the pretrained bundle.
        device: `BLIP_DEVICE`: "auto" (CUDA where it works, else the CPU), "cpu" or "cuda".
        dtype: `BLIP_DTYPE`: the precision to compute in; None for float16 on CUDA and float32 on the CPU.
        max_batch: `BLIP_MAX_BATCH`: how many requests of a task may run together.
        cuda_graphs: `BLIP_CUDA_GRAPHS`: "on", or "off" to run every decoding step eagerly on a GPU too.
    """

    weights: str
    cache: Path
    device: str
    dtype: str | None
    max_batch: int
    cuda_graphs: bool

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read the settings; an unset or empty variable has its default.

        Raises:
            ConfigError: a variable has an invalid value.
        """
        weights = environment.get("BLIP_WEIGHTS") or "pretrained"
        if weights not in ("demo", "pretrained") and not Path(weights).is_dir():
            raise ConfigError(
                f"BLIP_WEIGHTS={weights} is neither demo nor pretrained nor a directory; set it to one of the three."
            )
        device = _choice(environment, "BLIP_DEVICE", DEVICES)
        dtype = environment.get("BLIP_DTYPE") or None
        if dtype not in (None, *DTYPES):
            raise ConfigError(f"BLIP_DTYPE={dtype} is not known; set it to one of {', '.join(DTYPES)}.")
        return cls(
            weights=weights,
            cache=Path(environment.get("BLIP_CACHE") or "~/.cache/blip").expanduser(),
            device=device,
            dtype=dtype,
            max_batch=_number(environment, "BLIP_MAX_BATCH", "16", "requests"),
            cuda_graphs=_choice(environment, "BLIP_CUDA_GRAPHS", ("on", "off")) == "on",
        )

    def bundle_path(self) -> Path:
        """The directory of the weights bundle that `weights` names."""
        if self.weights == "demo":
            return DEMO
        if self.weights == "pretrained":
            return self.cache / "pretrained"
        return Path(self.weights)


@dataclass(frozen=True)
class Limits:
    """What the server accepts from outside; read by its own process, not by the predictor's.

    Attributes:
        max_image_bytes: `BLIP_MAX_IMAGE_BYTES`: the largest image file, sent or fetched.
        egress: `BLIP_EGRESS`: "public" (images and webhooks at public addresses only) or "any".
        grace_seconds: `BLIP_GRACE_SECONDS`: how long work in flight may take to end after SIGTERM.
    """

    max_image_bytes: int
    egress: str
    grace_seconds: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Limits":
        """Read the limits; an unset or empty variable has its default.

        Raises:
            ConfigError: a variable has an invalid value.
        """
        return cls(
            max_image_bytes=_number(environment, "BLIP_MAX_IMAGE_BYTES", "50000000", "bytes"),
            egress=_choice(environment, "BLIP_EGRESS", ("public", "any")),
            grace_seconds=_number(environment, "BLIP_GRACE_SECONDS", "60", "seconds"),
        )


def _choice(environment: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    """The value of a variable that has one of `choices`; the first is the default."""
    value = environment.get(name) or choices[0]
    if value not in choices:
        raise ConfigError(f"{name}={value} is not known; set it to {', '.join(choices[:-1])} or {choices[-1]}.")
    return value


def _number(environment: Mapping[str, str], name: str, default: str, unit: str) -> int:
    """The value of a variable that counts something."""
    value = environment.get(name) or default
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{name}={value} is not a number of {unit}; set it to 1 or more.")
    return int(value)
