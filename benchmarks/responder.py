"""A program in a process of its own that answers every line with a line of JSON."""

import contextlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.harness import ROOT


class Responder:
    """A running module of this package, in the environment of an interpreter; it ends with the `with` block.

    Args:
        python: the interpreter.
        command: the module's name, and the arguments of its command line.
        environment: added to this process's.
    """

    def __init__(self, python: Path, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self._python, self._command, self._environment = python, command, environment or {}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [self._python, "-W", "ignore", "-m", *self._command],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **self._environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # the end of its stdin ends it

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ask(self, line: str) -> dict[str, Any]:
        """Its answer to a line.

        Raises:
            SystemExit: it has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and then answers nothing
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"scripts/bench: {' '.join(self._command)} ended early; its message is above.")
        found: dict[str, Any] = json.loads(answer)
        return found
