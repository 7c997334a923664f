"""Print what a report of a fault should say: versions, machine, device, weights, settings without secrets."""

import argparse
from collections.abc import Sequence

from blip.config import Limits, Settings, check_cog_settings
from blip.errors import UserError
from blip.weights.bundle import open_bundle


def main(given: Sequence[str]) -> int:
    """Print it; with something that would keep the server from starting, say so last and return 1."""
    argparse.ArgumentParser("doctor", description=__doc__).parse_args(given)
    import torch

    from blip.about import about
    from blip.device import choose_device

    problems: list[str] = []
    device, weights = torch.device("cpu"), "unknown"
    try:
        check_cog_settings()
        Limits.from_environment()
        settings = Settings.from_environment()
        device = choose_device(settings.device)
        weights = describe(settings)
    except UserError as error:
        problems.append(str(error))
    for name, value in {**about(device), "weights": weights}.items():
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
    return f"{bundle.name} ({bundle.dtype}) at {path}, whole"
