"""What a benchmark's last line says, and where it is kept."""

import json
from datetime import UTC, datetime
from typing import Any

from benchmarks.harness import ROOT


def head(name: str, *, quick: bool) -> dict[str, Any]:
    """What every result begins with."""
    return {"benchmark": name, "quick": quick, "time": datetime.now(UTC).isoformat(timespec="seconds")}


def finish(result: dict[str, Any], keep_as: str | None) -> None:
    """Print the result as one line of JSON and, if it has a name, keep it under benchmarks/results."""
    line = json.dumps(result)
    if keep_as:
        (ROOT / "benchmarks" / "results" / f"{keep_as}.json").write_text(line + "\n")
    print(line)
