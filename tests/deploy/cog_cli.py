"""The Dockerfile that `cog build` makes of this repository: python -m tests.deploy.cog_cli BASE_IMAGE FOLDER

After replicate/cog 0.22.0, in pkg: dockerfile/standard_generator.go, config/config.go, requirements/requirements.go.
What cannot be had here is left out or replaced: the base image, which has PyTorch as the CLI's own have, tini, uv from
its image, and PyTorch's index.
"""

import re
import sys
from pathlib import Path

import yaml

from benchmarks.harness import ROOT

#: The CLI's own, which would need a compiler for packages that are only sources.
FLAGS = 'ENV CFLAGS="-O3 -funroll-loops -fno-strict-aliasing -flto -S"'


def requirements(lock: str) -> list[str]:
    """What the CLI makes of a lock: names and versions alone, without hashes and markers, and without cog."""
    lines = [line.partition("#")[0].strip() for line in lock.replace("\\\n", " ").splitlines()]
    pinned = [re.match(r"([a-zA-Z0-9_-]+)==([^ ]+)", line) for line in lines if line]
    return [f"{found[1]}=={found[2]}" for found in pinned if found and found[1] != "cog"]


def dockerfile(base: str) -> str:
    """The steps of the CLI, in its order."""
    config = yaml.safe_load((ROOT / "cog.yaml").read_text())
    build = config["build"]
    steps = [
        f"FROM {base}",
        "ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1",
        "RUN pip install --quiet uv",
        "ENV VIRTUAL_ENV=/opt/venv SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt",
        f"ENV {' '.join(config['environment'])}",
        "COPY --from=cog_build requirements.txt /tmp/requirements.txt",
        FLAGS,
        "RUN --mount=type=cache,target=/root/.cache/pip "
        "uv run pip install --cache-dir /root/.cache/pip -r /tmp/requirements.txt",
        "ENV CFLAGS=",
        f"RUN --mount=type=cache,target=/root/.cache/uv uv pip install --no-cache cog=={build['sdk_version']}",
        *(f"RUN {step['command'].strip()}" for step in build["run"]),
        "WORKDIR /src",
        "EXPOSE 5000",
        f'ENV COG_PREDICT_TYPE_STUB="{config["predict"]}"',
        f"ENV COG_MAX_CONCURRENCY={config['concurrency']['max']}",
        'CMD ["python", "-m", "cog.server.http"]',
        "COPY . /src",
    ]
    return "\n".join(steps) + "\n"


def main(base: str, folder: Path) -> None:
    """Write the Dockerfile and the requirements into the folder."""
    (folder / "Dockerfile").write_text(dockerfile(base))
    (folder / "requirements.txt").write_text("\n".join(requirements((ROOT / "requirements.txt").read_text())) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
