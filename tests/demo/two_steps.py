"""Trains the demo models for two steps and writes the bundle to the directory that is named."""

import sys
from pathlib import Path

from demo.bundle import write
from demo.train import train

if __name__ == "__main__":
    write(train(seed=0, steps=2), Path(sys.argv[1]), seed=0, steps=2)
