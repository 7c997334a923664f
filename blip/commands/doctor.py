"""Print what a report of a fault should say: versions, machine, device, weights, settings without secrets."""

import argparse
from collections.abc import Callable, Sequence

from blip.config import Limits, Settings, check_cog_settings, shown
from blip.errors import UserError
from blip.weights.bundle import open_bundle


def main(given: Sequence[str]) -> int:
    """Print it; what is wrong with settings, device or weights is said last, and the status is 1 then."""
    argparse.ArgumentParser("doctor", description=__doc__).parse_args(given)
    import torch

    from blip.about import about
    from blip.device import choose_device, default_dtype
    from blip.engine.kernels import PrecisionError
    from blip.engine.precision import check
    from blip.engine.trial import pinned

    device, more = torch.device("cpu"), dict[str, str]()
    problems: list[str] = []

    def look(step: Callable[[], object]) -> None:
        try:
            step()
        except (UserError, PrecisionError) as error:
            problems.append(str(error))

    def look_at_the_predictors_settings() -> None:
        nonlocal device
        settings = Settings.from_environment()
        look(lambda: more.update(weights=describe(settings)))
        device = choose_device(settings.device)
        more["precision"] = settings.dtype or default_dtype(device)
        check(device, more["precision"])
        if device.type == "cpu":
            pinned(settings.kernels, more["precision"])

    for step in (check_cog_settings, Limits.from_environment, look_at_the_predictors_settings):
        look(step)
    settings = ", ".join(f"{name}={value}" for name, value in shown().items()) or "none"
    for name, value in {**about(device), **more, "settings": settings}.items():
        print(f"{name:<18}{value}")
    for problem in problems:
        print(f"\n{problem}")
    return int(bool(problems))


def describe(settings: Settings) -> str:
    """The weights, every file of them looked at.

    Raises:
        UserError: they cannot be used.
    """
    path = settings.bundle_path()
    if settings.weights == "pretrained" and not path.exists():
        return f"pretrained, to be fetched to {path} at the first start"
    bundle = open_bundle(path)
    bundle.verify()
    return f"{bundle.name} ({bundle.dtype}) for {', '.join(bundle.tasks)} at {path}, whole"
