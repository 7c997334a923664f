"""Settings from the environment, read and validated once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "weights" / "demo"
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "float16", "bfloat16", "int8")


class ConfigError(Exception):
    """A setting that cannot be used; the message is one sentence that names the variable and the fix."""


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
            ConfigError: a variable has a value that means nothing.
        """
        weights = environment.get("BLIP_WEIGHTS") or "pretrained"
        if weights not in ("demo", "pretrained") and not Path(weights).is_dir():
            raise ConfigError(
                f"BLIP_WEIGHTS={weights} is neither demo nor pretrained nor a directory; set it to one of the three."
            )
        device = environment.get("BLIP_DEVICE") or "auto"
        if device not in DEVICES:
            raise ConfigError(f"BLIP_DEVICE={device} is not known; set it to auto, cpu or cuda.")
        dtype = environment.get("BLIP_DTYPE") or None
        if dtype not in (None, *DTYPES):
            raise ConfigError(f"BLIP_DTYPE={dtype} is not known; set it to one of {', '.join(DTYPES)}.")
        max_batch = environment.get("BLIP_MAX_BATCH") or "16"
        if not max_batch.isdecimal() or int(max_batch) < 1:
            raise ConfigError(f"BLIP_MAX_BATCH={max_batch} is not a number of requests; set it to 1 or more.")
        cuda_graphs = environment.get("BLIP_CUDA_GRAPHS") or "on"
        if cuda_graphs not in ("on", "off"):
            raise ConfigError(f"BLIP_CUDA_GRAPHS={cuda_graphs} is not known; set it to on or off.")
        return cls(
            weights=weights,
            cache=Path(environment.get("BLIP_CACHE") or "~/.cache/blip").expanduser(),
            device=device,
            dtype=dtype,
            max_batch=int(max_batch),
            cuda_graphs=cuda_graphs == "on",
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
    """

    max_image_bytes: int
    egress: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Limits":
        """Read the limits; an unset or empty variable has its default.

        Raises:
            ConfigError: a variable has a value that means nothing.
        """
        max_image_bytes = environment.get("BLIP_MAX_IMAGE_BYTES") or "50000000"
        if not max_image_bytes.isdecimal() or int(max_image_bytes) < 1:
            raise ConfigError(f"BLIP_MAX_IMAGE_BYTES={max_image_bytes} is not a number of bytes; set it to 1 or more.")
        egress = environment.get("BLIP_EGRESS") or "public"
        if egress not in ("public", "any"):
            raise ConfigError(f"BLIP_EGRESS={egress} is not known; set it to public or any.")
        return cls(int(max_image_bytes), egress)
