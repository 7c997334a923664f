"""The command line: python -m blip COMMAND [ARGUMENTS]."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "client": "ask a server about pictures",
    "caption": "caption folders of pictures, here or by servers",
    "watch": "print every change of a server's health",
    "download": "make the pretrained weights bundle from the published checkpoints",
    "bundle": "make, show, change or verify a weights bundle of any BLIP",
    "doctor": "print what a report of a fault should say",
    "verify": "compare the pretrained weights' results with published ones",
}


def main(arguments: Sequence[str]) -> int:
    """Run a command and return its exit status; without one, list them."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m blip COMMAND [ARGUMENTS]; COMMAND --help lists its options\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<10}{purpose}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"python -m blip: there is no command {name}; choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    # Imported only now: client and watch start fast and need no package.
    status: int = importlib.import_module(f"blip.commands.{name}").main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
