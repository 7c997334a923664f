"""The search on the device against the search in Python, on tables of scores; on the CPU here."""

import math
import random

import pytest
import torch
from torch import Tensor

from blip.engine.beam import Sample, Search, beam_search
from blip.engine.device_beam import DeviceSearch, agrees

END, PAD = 2, 0


class Case:
    """Scores that depend on the step, the sample and the last token; some have ties, NaN or infinities."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.batch = rng.randint(1, 60)
        words = rng.randint(7, 60)
        prompt = rng.randint(1, 4)
        longest = prompt + rng.randint(1, 13)
        rules = rng.choice(["lavis", "lavis", "transformers"])
        self.search = Search(rng.randint(1, 5), rng.randint(0, longest), longest, rules)
        self.prompt = torch.randint(3, words, (prompt,), generator=generator)
        table = torch.randn(longest, self.batch, words, words, generator=generator) * rng.uniform(0.2, 6)
        if seed % 3 == 0:
            table.round_()  # ties
        table[..., END] += rng.uniform(0, 4)
        for value in (math.nan, math.inf, -math.inf):
            if rng.random() < 0.2:
                table[rng.randrange(longest), rng.randrange(self.batch), rng.randrange(words)] = value
            if rng.random() < 0.1:
                table[rng.randrange(longest), ..., rng.randrange(words)] = value
        if rng.random() < 0.05:
            table[rng.randrange(longest)] = -math.inf
        self.table = table

    def scores(self, step: int, tokens: Tensor) -> Tensor:
        """(B, K) -> (B, K, V)."""
        return self.table[step][torch.arange(self.batch)[:, None], tokens]

    def in_python(self) -> list[list[object]]:
        steps = iter(range(1, len(self.table)))
        first = self.scores(0, self.prompt[-1].expand(self.batch, 1))[:, 0]
        prompt = self.prompt.expand(self.batch, -1)
        search = beam_search(
            prompt,
            first,
            lambda tokens, _: self.scores(next(steps), tokens),
            self.search,
            eos_token_id=END,
            pad_token_id=PAD,
        )
        return [outcomes(samples) for samples in search]

    def on_the_device(self) -> list[list[object]]:
        search = DeviceSearch(self.batch + 1, self.search, self.prompt, eos_token_id=END)
        real = torch.arange(self.batch + 1) < self.batch
        search.start(real)
        logits = self.scores(0, self.prompt[-1].expand(self.batch, self.search.num_beams))
        seen = []
        for step in range(1, len(self.table)):
            search.advance(torch.cat((logits, torch.full_like(logits[:1], math.nan))))  # a row of padding
            seen.append(outcomes(search.samples(self.batch, step)))
            if search.done.all() or len(self.prompt) + step == self.search.max_length:
                break
            logits = self.scores(step, search.next[: self.batch])
        return seen


def outcomes(samples: list[Sample]) -> list[object]:
    return [
        ("failed" if sample.error else (sample.done, sample.settled(), sample.tokens if sample.done else None))
        for sample in samples
    ]


@pytest.mark.parametrize("part", range(4))
def test_both_searches_choose_the_same_words_at_every_step(part: int) -> None:
    searches = 0
    for seed in range(part, 400, 4):
        case = Case(seed)
        assert case.on_the_device() == case.in_python(), seed
        searches += case.batch
    assert searches >= 2500


SEARCHES = (Search(3, 5, 16), Search(1, 5, 16), Search(4, 5, 16, "transformers"))


@pytest.mark.parametrize("search", SEARCHES)
def test_a_device_that_searches_as_python_does_agrees(search: Search) -> None:
    assert agrees(torch.device("cpu"), search)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_device_that_searches_otherwise_does_not_agree(search: Search) -> None:
    class Other(DeviceSearch):
        def advance(self, logits: Tensor) -> None:
            super().advance(logits * -1.5)

    assert not agrees(torch.device("cpu"), search, Other)
