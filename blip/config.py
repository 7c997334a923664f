"""Settings from the environment, read and validated once."""

import base64
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import blip
from blip.errors import ConfigError

DEMO = Path(__file__).resolve().parent.parent / "weights" / "demo"
DEVICES = ("auto", "cpu", "cuda")
DAY = 86_400  # seconds
SECRET_BYTES = 24  # the least that Standard Webhooks recommends
#: What the environment of a process that computes on a CPU should have: weights in pages of 2 MiB, where the system has
#: such pages for who asks, are read a tenth faster. glibc reads it once, at the start of a process.
COMPUTING = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
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
        kernels: `BLIP_KERNELS`: the kernels that are not to be chosen by trying them on a CPU; "" for none.
    """

    weights: str
    cache: Path
    device: str
    dtype: str | None
    max_batch: int
    cuda_graphs: bool
    kernels: str

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
            max_batch=_number(environment, "BLIP_MAX_BATCH", "16", "a number of requests"),
            cuda_graphs=_choice(environment, "BLIP_CUDA_GRAPHS", ("on", "off")) == "on",
            kernels=environment.get("BLIP_KERNELS") or "",
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
        keep_alive_seconds: `BLIP_KEEP_ALIVE_SECONDS`: how long an idle connection stays open.
        user_agent: `COG_USER_AGENT`: what a download says it is.
        log_clients: `BLIP_LOG_CLIENTS`: whether the log has the addresses of clients.
        cors_origins: `BLIP_CORS_ORIGINS`: the web pages whose scripts may ask, by origin; "*" for all.
        page: `BLIP_PAGE`: whether browsers get a page at /.
        webhook_secret: `BLIP_WEBHOOK_SECRET`: what webhooks are signed with; empty for no signature.
    """

    max_image_bytes: int
    egress: str
    grace_seconds: int
    keep_alive_seconds: int
    user_agent: str
    log_clients: bool
    cors_origins: tuple[str, ...]
    page: bool
    webhook_secret: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Limits":
        """Read the limits; an unset or empty variable has its default.

        Raises:
            ConfigError: a variable has an invalid value.
        """
        user_agent = environment.get("COG_USER_AGENT") or f"blip/{blip.__version__}"
        if not (user_agent.isascii() and user_agent.isprintable() and user_agent == user_agent.strip()):
            raise ConfigError("COG_USER_AGENT has characters that a header cannot have; set it to plain ASCII.")
        return cls(
            max_image_bytes=_number(environment, "BLIP_MAX_IMAGE_BYTES", "50000000", "a number of bytes"),
            egress=_choice(environment, "BLIP_EGRESS", ("public", "any")),
            grace_seconds=_number(environment, "BLIP_GRACE_SECONDS", "60", "a number of seconds", most=DAY),
            keep_alive_seconds=_number(environment, "BLIP_KEEP_ALIVE_SECONDS", "75", "a number of seconds", most=DAY),
            user_agent=user_agent,
            log_clients=_choice(environment, "BLIP_LOG_CLIENTS", ("on", "off")) == "on",
            cors_origins=_origins(environment),
            page=_choice(environment, "BLIP_PAGE", ("on", "off")) == "on",
            webhook_secret=_secret(environment),
        )


#: The settings that may be shown as they are; docs/operating.md lists them.
SHOWN = (
    *("BLIP_CACHE", "BLIP_CORS_ORIGINS", "BLIP_CUDA_GRAPHS", "BLIP_DEVICE", "BLIP_DTYPE", "BLIP_EGRESS"),
    *("BLIP_GRACE_SECONDS", "BLIP_KEEP_ALIVE_SECONDS", "BLIP_KERNELS", "BLIP_LOG_CLIENTS", "BLIP_MAX_BATCH"),
    *("BLIP_MAX_IMAGE_BYTES", "BLIP_PAGE", "BLIP_WEIGHTS", "COG_LOG_LEVEL", "COG_MAX_CONCURRENCY"),
    *("COG_PREDICT_TYPE_STUB", "COG_THROTTLE_RESPONSE_INTERVAL", "FORWARDED_ALLOW_IPS", "LOG_FORMAT", "PORT", "TMPDIR"),
)
#: Those that may hold a secret, of which only that they are set is shown.
HIDDEN = ("BLIP_MIRROR", "BLIP_WEBHOOK_SECRET", "COG_USER_AGENT", "HTTPS_PROXY", "HTTP_PROXY", "WEBHOOK_AUTH_TOKEN")


def shown(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The settings that are set, without what may be a secret."""
    named = {name: value for name, value in environment.items() if value and name in (*SHOWN, *HIDDEN)}
    return {name: value if name in SHOWN else "(set)" for name, value in sorted(named.items())}


def check_cog_settings(environment: Mapping[str, str] = os.environ) -> None:
    """Check the settings that Cog reads by itself, and meets with a traceback.

    Raises:
        ConfigError: a variable has an invalid value.
    """
    _number(environment, "PORT", "5000", "a port", most=65_535)
    _number(environment, "COG_MAX_CONCURRENCY", "32", "a number of slots", most=10_000)
    level = environment.get("COG_LOG_LEVEL") or "info"
    if level.upper() not in logging.getLevelNamesMapping():
        raise ConfigError(f"COG_LOG_LEVEL={level} is not known; set it to debug, info, warning or error.")
    interval = environment.get("COG_THROTTLE_RESPONSE_INTERVAL") or "0.5"
    try:
        usable = 0 <= float(interval) <= DAY
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            f"COG_THROTTLE_RESPONSE_INTERVAL={interval} is not a number of seconds; set it to a number from 0 to {DAY}."
        )


def _origins(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The web pages that BLIP_CORS_ORIGINS lists, separated by commas."""
    value = environment.get("BLIP_CORS_ORIGINS") or ""
    origins = tuple(filter(None, (part.strip() for part in value.split(","))))
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s?#@]+", origin):
            raise ConfigError(
                f"BLIP_CORS_ORIGINS has {origin}, which is no origin; list some like https://example.org."
            )
    return origins


def _secret(environment: Mapping[str, str]) -> str:
    """The secret for signatures, which is base64 after an optional prefix (standardwebhooks.com); not shown."""
    value = environment.get("BLIP_WEBHOOK_SECRET") or ""
    try:
        long_enough = not value or len(base64.b64decode(value.removeprefix("whsec_"), validate=True)) >= SECRET_BYTES
    except ValueError:
        long_enough = False
    if not long_enough:
        raise ConfigError(
            f"BLIP_WEBHOOK_SECRET is not base64 of {SECRET_BYTES} bytes or more; set it to whsec_ and some random ones."
        )
    return value


def _choice(environment: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    """The value of a variable that has one of `choices`; the first is the default."""
    value = environment.get(name) or choices[0]
    if value not in choices:
        raise ConfigError(f"{name}={value} is not known; set it to {', '.join(choices[:-1])} or {choices[-1]}.")
    return value


def _number(environment: Mapping[str, str], name: str, default: str, unit: str, most: int | None = None) -> int:
    """The value of a variable that counts something, from 1 to `most`."""
    value = environment.get(name) or default
    # int() refuses more than 4,300 digits.
    if not (value.isdecimal() and len(value) < 20 and 1 <= int(value) <= (most or int(value))):
        allowed = f"a number from 1 to {most}" if most else "1 or more"
        raise ConfigError(f"{name}={value} is not {unit}; set it to {allowed}.")
    return int(value)
