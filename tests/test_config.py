"""Settings from the environment."""

from pathlib import Path

import pytest

from blip.config import Limits, Settings
from blip.errors import ConfigError


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
    }
    assert Settings.from_environment(environment) == Settings(
        str(tmp_path), Path("/var/cache"), "cpu", "bfloat16", max_batch=4, cuda_graphs=False
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
            "BLIP_GRACE_SECONDS=soon is not a number of seconds; set it to 1 or more.",
        ),
        ("BLIP_EGRESS", "private", "BLIP_EGRESS=private is not known; set it to public or any."),
    ],
)
def test_a_variable_that_means_nothing_is_one_sentence(variable: str, value: str, sentence: str) -> None:
    kind = Limits if variable in ("BLIP_MAX_IMAGE_BYTES", "BLIP_EGRESS", "BLIP_GRACE_SECONDS") else Settings
    with pytest.raises(ConfigError) as caught:
        kind.from_environment({variable: value})
    assert str(caught.value) == sentence


def test_the_limits_are_50_mb_and_public_addresses_unless_said_otherwise() -> None:
    assert Limits.from_environment({"BLIP_EGRESS": ""}) == Limits(50_000_000, "public", 60)
    environment = {"BLIP_MAX_IMAGE_BYTES": "1000", "BLIP_EGRESS": "any", "BLIP_GRACE_SECONDS": "5"}
    assert Limits.from_environment(environment) == Limits(1000, "any", 5)
