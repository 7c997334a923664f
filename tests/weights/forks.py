"""Work in a process of its own, to be killed or to run beside another."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import torch


def forked(work: Callable[[], object]) -> BaseProcess:
    """Start `work` in a process that is forked, so that it need not import anything."""

    def run() -> None:
        torch.set_num_threads(1)  # the threads of the parent did not come along
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process
