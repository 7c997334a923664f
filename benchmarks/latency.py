"""One request at a time: LAVIS as the reference build calls it, Hugging Face's BLIP, that in OpenVINO, and our engine.

    scripts/bench latency [--rounds N] [--task NAME ...] [--scenes N] [--quick]

Full-size models with random weights, the same for LAVIS and for ours. Each contender has a process of its own, so that
its peak memory is its own; they take turns, so that whatever else the machine does falls on all. Beside the speed of a
precision stands how often its string differs from LAVIS's (of OpenVINO's, whose weights are others, from that of
Hugging Face's BLIP in PyTorch) or, for a match, how far its probability is off at most: on
the random images timed here, whose nearly equal scores are the hardest case, and on scenes drawn for the demo weights.
Prints tables and one line of JSON. A run of all tasks keeps that line under benchmarks/results, by the processor.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contender import OPENVINO, OPENVINO_PRECISIONS, TASKS
from benchmarks.harness import ROOT
from benchmarks.hf_environment import hf_python, openvino_python
from benchmarks.machine import machine
from benchmarks.outcome import finish, head, of_processor
from benchmarks.race import print_table, race, race_small
from benchmarks.scenes import disagreement
from blip.config import DTYPES
from blip.engine.kernels import PrecisionError
from blip.engine.precision import check

PACKAGES = ("torch", "transformers", "salesforce-lavis", "timm", "openvino", "nncf")
QUICK_TASKS = ("caption-12", "answer-4", "match")
QUICK_SCENES = 2


def main(argv: Sequence[str]) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="scripts/bench latency", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each contender on each task (default 7)")
    parser.add_argument("--task", choices=TASKS, action="append", help="only this task; may be repeated")
    parser.add_argument("--scenes", type=int, default=500, help="drawn scenes to compare answers on (default 500)")
    parser.add_argument(
        "--quick", action="store_true", help="small models, float32, one round, no Hugging Face, no OpenVINO: a trial"
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.scenes = 1, QUICK_SCENES

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = ["float32"] if options.quick else precisions(device)
    pythons = dict.fromkeys(["lavis", *names], Path(sys.executable))
    rows = []
    if options.quick:
        print("Quick: small models in float32, one round; Hugging Face's BLIP and OpenVINO are left out.")
        for found in race_small(pythons, options.task or QUICK_TASKS):
            print_table(found)
            rows += found
    else:
        peers = {"hf": hf_python()}
        if device.type == "cpu":
            peers |= dict.fromkeys((f"{OPENVINO}{name}" for name in OPENVINO_PRECISIONS), openvino_python())
        pythons = {"lavis": pythons["lavis"], **peers, **pythons}
        for task in options.task or TASKS:
            found = race(pythons, task, options.rounds)
            print_table(found)
            rows += found
    result = {
        **head("latency", quick=options.quick),
        **machine(device.type),
        "versions": {
            name: versions(pythons[key])
            for name, key in (("ours", "lavis"), ("hf", "hf"), ("openvino", f"{OPENVINO}float32"))
            if key in pythons
        },
        "rounds": options.rounds,
        "rows": rows,
        "scenes": compare_on_scenes(options.scenes, device, names),
    }
    print(f"\non {result['cpu']}, {result['cores']} cores, {result.get('gpu', 'no GPU')}")
    finish(result, None if options.task or options.quick else of_processor(f"latency-{device.type}", result))


def compare_on_scenes(count: int, device: torch.device, names: Sequence[str]) -> dict[str, Any]:
    """How often each precision's result on the demo weights is not LAVIS's."""
    rates = disagreement(count, device, names)
    print(f"\nof {count} drawn scenes, different from LAVIS:")
    for name, rate in rates.items():
        shares = "  ".join(f"{task} {rate[task]:.1%}" for task in ("caption", "answer", "match"))
        print(f"{name:12} {shares}  (probability by {rate['largest_difference']:.1e} at most)")
    return {"count": count, "different": rates}


def precisions(device: torch.device) -> list[str]:
    """Those that this machine has."""
    names = []
    for name in DTYPES:
        try:
            check(device, name)
        except PrecisionError as reason:
            print(f"without {name}: {reason}")
        else:
            names.append(name)
    return names


def versions(python: Path) -> dict[str, str]:
    """Of the packages that matter in the environment of `python`."""
    command = [str(python), "-m", "benchmarks.versions", *PACKAGES]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
