"""The versions in the environment that runs this: python -m benchmarks.versions PACKAGE ..."""

import importlib.metadata
import json
import platform
import sys


def versions(packages: list[str]) -> dict[str, str]:
    """Of Python, and of those packages that are there."""
    found = {"python": platform.python_version()}
    for distribution in importlib.metadata.distributions():
        if distribution.name in packages:
            found[distribution.name] = distribution.version
    return found


if __name__ == "__main__":
    print(json.dumps(versions(sys.argv[1:])))
