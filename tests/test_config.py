"""Settings from the environment."""

from pathlib import Path

import pytest

from blip import __version__
from blip.config import Limits, Settings, check_cog_settings
from blip.errors import ConfigError

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_an_empty_environment_means_pretrained_weights_on_any_device() -> None:
    settings = Settings.from_environment({"BLIP_WEIGHTS": ""})
    assert (settings.weights, settings.device, settings.dtype) == ("pretrained", "auto", None)
    assert settings.cache == Path("~/.cache/blip").expanduser()


def test_every_setting_is_taken_from_its_variable(tmp_path: Path) -> None:
    environment = {
        "BLIP_WEIGHTS": str(tmp_path),
        "BLIP_CACHE": "/var/cache",
        "BLIP_DEVICE": "cpu",
        "BLIP_DTYPE": "bfloat16",
        "BLIP_MAX_BATCH": "4",
        "BLIP_CUDA_GRAPHS": "off",
        "BLIP_KERNELS": "attention=heads",
    }
    assert Settings.from_environment(environment) == Settings(
        str(tmp_path), Path("/var/cache"), "cpu", "bfloat16", max_batch=4, cuda_graphs=False, kernels="attention=heads"
    )


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        (
            "BLIP_WEIGHTS",
            "large",
            "BLIP_WEIGHTS=large is neither demo nor pretrained nor a directory; set it to one of the three.",
        ),
        ("BLIP_DEVICE", "tpu", "BLIP_DEVICE=tpu is not known; set it to auto, cpu or cuda."),
        (
            "BLIP_DTYPE",
            "float64",
            "BLIP_DTYPE=float64 is not known; set it to one of float32, float16, bfloat16, int8.",
        ),
        ("BLIP_MAX_BATCH", "0", "BLIP_MAX_BATCH=0 is not a number of requests; set it to 1 or more."),
        ("BLIP_CUDA_GRAPHS", "1", "BLIP_CUDA_GRAPHS=1 is not known; set it to on or off."),
        ("BLIP_MAX_BATCH", "many", "BLIP_MAX_BATCH=many is not a number of requests; set it to 1 or more."),
        (
            "BLIP_MAX_IMAGE_BYTES",
            "50MB",
            "BLIP_MAX_IMAGE_BYTES=50MB is not a number of bytes; set it to 1 or more.",
        ),
        (
            "BLIP_GRACE_SECONDS",
            "soon",
            "BLIP_GRACE_SECONDS=soon is not a number of seconds; set it to a number from 1 to 86400.",
        ),
        *(
            (name, value, f"{name}={value} is not a number of seconds; set it to a number from 1 to 86400.")
            for name in ("BLIP_GRACE_SECONDS", "BLIP_KEEP_ALIVE_SECONDS")
            for value in ("nan", "inf", "1e10", "10000000000", "-1", "0", "9" * 5000)
        ),
        ("BLIP_EGRESS", "private", "BLIP_EGRESS=private is not known; set it to public or any."),
        ("BLIP_LOG_CLIENTS", "no", "BLIP_LOG_CLIENTS=no is not known; set it to on or off."),
        ("BLIP_PAGE", "no", "BLIP_PAGE=no is not known; set it to on or off."),
        *(
            (
                "BLIP_CORS_ORIGINS",
                f"https://a.example,{wrong}",
                f"BLIP_CORS_ORIGINS has {wrong}, which is no origin; list some like https://example.org.",
            )
            for wrong in ("example.org", "https://example.org/", "https://me@example.org", "null")
        ),
        *(
            (
                "BLIP_WEBHOOK_SECRET",
                wrong,
                "BLIP_WEBHOOK_SECRET is not base64 of 24 bytes or more; set it to whsec_ and some random ones.",
            )
            for wrong in ("secret", "whsec_", "whsec_c2hvcnQ=", "whsec_" + "%" * 40)
        ),
    ],
)
def test_a_variable_that_means_nothing_is_one_sentence(variable: str, value: str, sentence: str) -> None:
    names = ("WEIGHTS", "CACHE", "DEVICE", "DTYPE", "MAX_BATCH", "CUDA_GRAPHS")
    kind = Settings if variable.removeprefix("BLIP_") in names else Limits
    with pytest.raises(ConfigError) as caught:
        kind.from_environment({variable: value})
    assert str(caught.value) == sentence


def test_the_limits_are_50_mb_and_public_addresses_unless_said_otherwise() -> None:
    assert Limits.from_environment({"BLIP_EGRESS": ""}) == Limits(
        50_000_000,
        "public",
        60,
        75,
        f"blip/{__version__}",
        log_clients=True,
        cors_origins=(),
        page=True,
        webhook_secret="",
    )
    environment = {"BLIP_MAX_IMAGE_BYTES": "1000", "BLIP_EGRESS": "any", "BLIP_GRACE_SECONDS": "5"}
    environment |= {"BLIP_KEEP_ALIVE_SECONDS": "600", "COG_USER_AGENT": "pictures/2 (someone@example.com)"}
    environment |= {"BLIP_LOG_CLIENTS": "off", "BLIP_CORS_ORIGINS": "https://a.example, http://localhost:3000"}
    environment |= {"BLIP_WEBHOOK_SECRET": SECRET, "BLIP_PAGE": "off"}
    expected = Limits(
        1000,
        "any",
        5,
        600,
        "pictures/2 (someone@example.com)",
        log_clients=False,
        cors_origins=("https://a.example", "http://localhost:3000"),
        page=False,
        webhook_secret=SECRET,
    )
    assert Limits.from_environment(environment) == expected


@pytest.mark.parametrize("agent", ["two\nlines", "caf\u00e9", "\u2603", " "])
def test_a_user_agent_that_no_header_can_have_is_one_sentence(agent: str) -> None:
    with pytest.raises(ConfigError, match=r"^COG_USER_AGENT has characters that a header cannot have; set it to"):
        Limits.from_environment({"COG_USER_AGENT": agent})


SLOTS = "COG_MAX_CONCURRENCY=0 is not a number of slots; set it to a number from 1 to 10000."
INTERVAL = "is not a number of seconds; set it to a number from 0 to 86400."


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("PORT", "abc", "PORT=abc is not a port; set it to a number from 1 to 65535."),
        ("PORT", "65536", "PORT=65536 is not a port; set it to a number from 1 to 65535."),
        (
            "COG_MAX_CONCURRENCY",
            "0",
            SLOTS,
        ),
        ("COG_LOG_LEVEL", "loud", "COG_LOG_LEVEL=loud is not known; set it to debug, info, warning or error."),
        *(
            (
                "COG_THROTTLE_RESPONSE_INTERVAL",
                value,
                f"COG_THROTTLE_RESPONSE_INTERVAL={value} {INTERVAL}",
            )
            for value in ("nan", "inf", "-1", "1e10", "fast")
        ),
    ],
)
def test_a_setting_of_cog_that_means_nothing_is_one_sentence(variable: str, value: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_cog_settings({variable: value})
    assert str(caught.value) == sentence


@pytest.mark.parametrize("level", ["DEBUG", "info", "Warning", "error", ""])
def test_settings_of_cog_that_mean_something_are_taken(level: str) -> None:
    check_cog_settings({"COG_LOG_LEVEL": level, "PORT": "80", "COG_THROTTLE_RESPONSE_INTERVAL": "0"})
