"""How many pictures a server is asked about at a time."""

import yaml

from benchmarks.harness import ROOT
from blip.config import Settings
from blip.folder.askers import AT_A_TIME


def test_a_server_runs_a_whole_batch_while_more_wait_and_has_slots_left() -> None:
    slots = yaml.safe_load((ROOT / "cog.yaml").read_text())["concurrency"]["max"]
    assert Settings.from_environment({}).max_batch < AT_A_TIME < slots
