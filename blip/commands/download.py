"""Fetch BLIP's published checkpoints and make the weights bundle that BLIP_WEIGHTS=pretrained serves.

A download that was interrupted continues; a finished bundle is verified. With BLIP_MIRROR=URL the four files come
from that address instead of their publishers.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from blip.config import Settings
from blip.errors import UserError
from blip.weights.bundle import VOCABULARY, open_bundle
from blip.weights.making import DTYPES
from blip.weights.pretrained import Upstream, build, published


def main(given: Sequence[str]) -> int:
    """Build or verify the bundle and print its sizes; on failure print one sentence and return 1."""
    try:
        run(given)
    except UserError as error:
        print(f"download_models: {error}", file=sys.stderr)
        return 1
    return 0


def run(given: Sequence[str]) -> None:
    """Do what the command line asks.

    Raises:
        UserError: a setting or a file cannot be used, or the network fails.
    """
    default = Settings.from_environment({**os.environ, "BLIP_WEIGHTS": "pretrained"}).bundle_path()
    parser = argparse.ArgumentParser(
        "download_models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=default, help="the bundle's directory (%(default)s)")
    parser.add_argument("--from", dest="source", type=Path, help="a directory with the .pth files, downloaded already")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="what weights are stored as (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the downloads, in blip-downloads beside the bundle")
    arguments = parser.parse_args(given)
    upstream = published()
    build(upstream, arguments.out, arguments.dtype, report, source=arguments.source, keep=arguments.keep)
    print(table(upstream, arguments.out))


def report(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def table(upstream: Upstream, out: Path) -> str:
    """The bytes of each file before and after."""
    bundle = open_bundle(out)
    rows = [("", "published", "in the bundle")]
    before, after = upstream.vocabulary.size or 0, bundle.files[VOCABULARY].size
    rows.append((VOCABULARY, f"{before:,}", f"{after:,}"))
    for task, file in upstream.checkpoints.items():
        size = sum(entry.size for name, entry in bundle.files.items() if name.startswith(f"{task}/"))
        rows.append((f"{task} ({file.name})", f"{file.size or 0:,}", f"{size:,}"))
        before, after = before + (file.size or 0), after + size
    rows.append((f"bytes, {bundle.dtype}", f"{before:,}", f"{after:,}"))
    return "\n".join(f"{name:<52}{published:>16}{bundled:>16}" for name, published, bundled in rows)
