"""What a benchmark's last line says, and where it is kept."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from benchmarks.harness import ROOT


def head(name: str, *, quick: bool) -> dict[str, Any]:
    """What every result begins with."""
    return {"benchmark": name, "quick": quick, "time": datetime.now(UTC).isoformat(timespec="seconds")}


def share_different(pairs: Sequence[tuple[object, object]]) -> float:
    """How many of the pairs of outputs are not the same, of 1."""
    return round(sum(ours != theirs for ours, theirs in pairs) / len(pairs), 4)


def of_processor(name: str, result: dict[str, Any]) -> str:
    """The name that a result is kept as where each processor has its own."""
    return f"{name}-{'-'.join(re.findall('[A-Za-z0-9.]+', result['cpu']))}"


def keep(result: dict[str, Any], name: str) -> None:
    """Keep the result under benchmarks/results."""
    (ROOT / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(result) + "\n")


def finish(result: dict[str, Any], keep_as: str | None) -> None:
    """Print the result as one line of JSON and, if it has a name, keep it."""
    if keep_as:
        keep(result, keep_as)
    print(json.dumps(result))
