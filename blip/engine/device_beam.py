"""The search of beam.py in operations of fixed shapes on the device, to be captured with the decoder's step.

It takes the same choices. The host reads nothing but `done`, and the outcome at the end. Each operation is a kernel
that the next step waits for, so they are few: beams are not moved but traced back at the end, and hypotheses that end
in one step are added together.
Shapes: B samples, K beams, T tokens of the longest result, P of the prompt, V words.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from blip.engine.beam import NonFiniteLogitsError, Sample, Search, beam_search, best, ranked


class DeviceSearch:
    """The searches of a batch: `start`, then `advance` with the logits of every step.

    Attributes:
        prompt: (P,), the same for all.
        next: (B, K), the tokens chosen for the live beams; any word for done samples.
        parents: (B, K), the beams that they continue.
        scores: (B, K), summed log probabilities of the live beams, best first.
        done: (B,) bool.
    """

    def __init__(self, batch: int, search: Search, prompt: Tensor, *, eos_token_id: int) -> None:
        """Reserve the buffers on the device of `prompt`."""
        beams, longest, device = search.num_beams, search.max_length, prompt.device
        first = len(prompt)
        self._search = search
        self._eos = eos_token_id
        self.prompt, self._begin = prompt, prompt.tolist()
        self._candidates = torch.zeros(2, batch, 2 * beams, dtype=torch.long, device=device)  # tokens, parents
        self._chosen = torch.zeros(2, batch, beams, dtype=torch.long, device=device)
        self.next, self.parents = self._chosen
        self._history = torch.zeros(longest, 2, batch, beams, dtype=torch.long, device=device)  # what was chosen
        self.scores = torch.zeros(batch, beams, device=device)
        # Hypotheses: their scores, as Python's numbers are, and their orders. First come those that end in this step if
        # the candidates of that rank do, then those kept. An order is (length K + rank) K + parent: it tells what was
        # added later, and where the tokens are. A place without a hypothesis has NaN, and an order below zero.
        self._hypotheses = torch.zeros(2, batch, 2 * beams, dtype=torch.double, device=device)
        self._ending, self._kept = self._hypotheses.split(beams, dim=2)
        self._failed = torch.zeros(batch, dtype=torch.bool, device=device)
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)  # of the tokens that are chosen next
        # Of tokens; then by the rules: of a hypothesis that ends now, of a live beam after this step, of the longest.
        lengths = (
            *(first, search.length(first, first, ended=True), search.length(first + 1, first, ended=False)),
            search.length(longest, first, ended=False),
        )
        self._lengths_at_first = torch.tensor(lengths, dtype=torch.double, device=device)
        self._lengths = self._lengths_at_first.clone()
        self._length, self._ending_length = self._lengths[:1], self._lengths[1:2]
        self._ranks = torch.arange(beams, device=device)
        self._places = torch.arange(beams, 2 * beams, device=device)[:, None]  # of the hypotheses kept
        self._ahead = torch.arange(2 * beams, device=device) - self._ranks[:, None]  # (K, 2K)
        self._first = torch.tensor([0.0] + [-1e9] * (beams - 1), device=device)

    def start(self, real: Tensor) -> None:
        """Begin where `real` (B,) is true; the other samples are padding, and done."""
        self._position.fill_(len(self.prompt))
        self._lengths.copy_(self._lengths_at_first)
        self.scores.copy_(self._first.expand_as(self.scores))
        scores, orders = self._kept
        scores.fill_(math.nan)
        orders.copy_((self._ranks - len(self._ranks)).expand_as(orders))
        self._failed.zero_()
        self.done.copy_(~real)

    def advance(self, logits: Tensor) -> None:
        """Choose the next tokens by the logits (B, K, V) of the live beams; what done samples have finished stays."""
        _, beams, vocab = logits.shape
        totals = ranked(logits, self.scores, self._search)  # (B, K, V)
        totals[..., self._eos].masked_fill_(self._length < self._search.min_length, -math.inf)
        top, ids = best(totals)  # (B, 2K)
        tokens, parents = self._candidates
        torch.div(ids, vocab, rounding_mode="floor", out=parents)
        torch.sub(ids, parents, alpha=vocab, out=tokens)
        failed = top[:, 0].isnan() > self.done  # (B,), of bools: and not done; see Sample.advance
        self._failed.logical_or_(failed)
        self.done.logical_or_(failed)

        # The K best that do not end become the live beams. Beam k is the first with k others that do not end before it.
        ends = tokens == self._eos
        ended = ends.cumsum(1)  # (B, 2K), with those before
        chosen = (ended[:, None] > self._ahead).sum(-1)  # (B, K) ranks
        torch.gather(top, 1, chosen, out=self.scores)
        torch.gather(self._candidates, 2, chosen.expand(2, -1, -1), out=self._chosen)
        self._history.index_copy_(0, self._position, self._chosen[None])

        self._finish(top[:, :beams], parents[:, :beams], ended[:, :beams], ends[:, :beams] > self.done[:, None])
        self.done.logical_or_(self._are_done())
        self._position.add_(1)
        self._lengths[:3].add_(1)

    def _finish(self, top: Tensor, parents: Tensor, ended: Tensor, ends: Tensor) -> None:
        """Add the live beams that end among the first K candidates, as `BeamHypotheses.add` does one after the other.

        All arguments are (B, K), by rank. The n-th that ends meets the n-th worst of those kept, and takes its place if
        it is better. Those after it are no better, and meet better ones.
        """
        count = len(self._ranks)
        torch.div(top, self._ending_length, out=self._ending[0])
        self._round(self._ending[0])
        torch.add(torch.add(parents, self._ranks, alpha=count), self._length, alpha=count**2, out=self._ending[1])
        # Each of those kept (dimension 1) beside the others: of two equal ones the older counts as worse.
        (scores, orders), (others, other_orders) = self._kept[..., None], self._kept[:, :, None]
        at_least = (scores > others) | ((orders >= other_orders) > (scores < others))  # (B, K, K)
        place = at_least.sum(-1, keepdim=True)  # (B, K, 1), 1 for the worst
        # Now beside each that ends (dimension 2).
        enters = ((place == ended[:, None]) & ends[:, None]) > (self._ending[0, :, None] <= scores)
        source = torch.where(enters, self._ranks, self._places).amin(-1)  # (B, K)
        self._kept.copy_(self._hypotheses.gather(2, source.expand(2, -1, -1)))

    def _are_done(self) -> Tensor:
        """`Sample._is_done` for all, (B,); where there is NaN no comparison holds."""
        kept, first = self._kept[0], self._ending[0, :, :1]  # the score of the best candidate, had it ended
        if len(self._ranks) == 1:
            ended: Tensor = ~kept.isnan().squeeze(1)
            return ended
        # Had the best live beam ended after this step, or at last.
        now, longest = self._round(self.scores[:, :1] / self._lengths[2:]).split(1, dim=1)
        bound = torch.minimum(first, now) if self._search.rules == "lavis" else now
        done: Tensor = (kept >= bound).all(1) | (kept > longest).any(1)
        return done

    def _round(self, scores: Tensor) -> Tensor:
        """As `Search.score` does it, in place."""
        return scores if self._search.rules == "lavis" else scores.copy_(scores.float())

    def samples(self, batch: int, chosen: int) -> list[Sample]:
        """Read the first `batch` searches from the device, as they stand after `chosen` calls of `advance`."""
        beams, first = self._search.num_beams, len(self.prompt)
        flags = torch.stack((self.done, self._failed), dim=1)
        state = torch.cat((self.scores.double(), *self._kept, flags.double()), dim=1)[:batch].cpu()
        length = first + chosen
        history = self._history[first:length, :, :batch].cpu()
        orders = state[:, 2 * beams : 3 * beams].long()
        # Trace the live beams and the hypotheses back, all at the same time, each from its own length.
        lengths = torch.cat((torch.full_like(orders, length), orders // beams**2), dim=1)  # (B, 2K)
        beam = torch.cat((torch.arange(beams).expand_as(orders), orders % beams), dim=1)
        tokens = torch.empty(*beam.shape, length - first, dtype=torch.long)
        for position in reversed(range(first, length)):
            tokens[..., position - first], parent = history[position - first].gather(2, beam.expand(2, -1, -1))
            beam = torch.where(position < lengths, parent, beam)
        rows = [[self._begin + row for row in sample] for sample in tokens.tolist()]
        return [self._sample(*found) for found in zip(rows, lengths.tolist(), state.tolist(), strict=True)]

    def _sample(self, rows: list[list[int]], lengths: list[int], state: list[float]) -> Sample:
        beams = self._search.num_beams
        sample = Sample(self._begin, self._search, self._eos)
        sample.beams = rows[:beams]
        sample.scores, scores, orders = state[:beams], state[beams : 2 * beams], state[2 * beams : 3 * beams]
        added = sorted((order, place) for place, order in enumerate(orders) if order >= 0)
        sample.finished = [(scores[place], rows[beams + place][: lengths[beams + place]]) for _, place in added]
        sample.worst = min((score for score, _ in sample.finished), default=sample.worst)
        done, failed = map(bool, state[3 * beams :])
        sample.done = done
        if failed:
            sample.error = NonFiniteLogitsError()
        elif not done and lengths[0] == self._search.max_length:
            sample.end()
        return sample


def agrees(device: torch.device, search: Search, kind: type[DeviceSearch] = DeviceSearch) -> bool:
    """Whether `kind` finds on `device` what beam.py's search finds, with the same scores drawn at random."""
    batch, words, search = 4, 48, replace(search, min_length=5, max_length=16)
    eos, pad = 2, 0
    prompt = torch.tensor([3, 4], device=device)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(search.max_length, words, words, generator=generator).mul_(3).to(device)
    steps = iter(range(1, search.max_length))

    def step(tokens: Tensor, _: Tensor) -> Tensor:
        return table[next(steps)][tokens]  # (B, K, V)

    first = table[0][prompt[-1:]].expand(batch, words) + torch.arange(batch, device=device)[:, None] * table[1][0]
    *_, wanted = beam_search(prompt.expand(batch, -1), first, step, search, eos_token_id=eos, pad_token_id=pad)
    tried = kind(batch, search, prompt, eos_token_id=eos)
    tried.start(torch.ones(batch, dtype=torch.bool, device=device))
    tried.advance(first[:, None].expand(-1, search.num_beams, -1))
    for length in range(1, search.max_length - len(prompt)):
        tried.advance(table[length][tried.next])
    found = tried.samples(batch, search.max_length - len(prompt))
    return [sample.tokens for sample in found] == [sample.tokens for sample in wanted]
