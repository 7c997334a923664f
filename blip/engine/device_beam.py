"""The search of beam.py in operations of fixed shapes on the device, to be captured with the decoder's step.

It takes the same choices. The host reads nothing but `done`, and the outcome at the end.
Shapes: B samples, K beams, T tokens of the longest result, V words. Rows 0 to K-1 of a sample are its live beams, rows
K to 2K-1 its finished hypotheses.
"""

import math

import torch
from torch import Tensor

from blip.engine.beam import NonFiniteLogitsError, Sample, Search, beam_search

_NEVER = 2**31  # later than any hypothesis was finished


class DeviceSearch:
    """The searches of a batch: `start`, then `advance` with the logits of every step.

    Attributes:
        prompt: (P,), the same for all.
        next: (B, K), the tokens chosen for the live beams.
        parents: (B, K), the beams that they continue.
        done: (B,) bool.
    """

    def __init__(self, batch: int, search: Search, prompt: Tensor, *, eos_token_id: int, pad_token_id: int) -> None:
        """Reserve the buffers on the device of `prompt`."""
        beams, longest, device = search.num_beams, search.max_length, prompt.device
        self._search = search
        self._eos, self._pad = eos_token_id, pad_token_id
        self.prompt = prompt
        self._tokens = torch.zeros(batch, 2 * beams, longest, dtype=torch.long, device=device)
        self._length = torch.zeros(1, dtype=torch.long, device=device)  # tokens of a live beam
        self._scores = torch.zeros(batch, beams, device=device)
        # Of the finished hypotheses: their scores, as Python's numbers are, and the order in which they were added:
        # their length times K, plus the rank at which they ended; -1 where there is none.
        self._finals = torch.zeros(batch, beams, dtype=torch.double, device=device)
        self._order = torch.zeros(batch, beams, dtype=torch.long, device=device)
        self._failed = torch.zeros(batch, dtype=torch.bool, device=device)
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)
        self.next, self.parents = (torch.zeros(batch, beams, dtype=torch.long, device=device) for _ in range(2))
        self._beams = torch.arange(beams, device=device)
        self._ranks = torch.arange(2 * beams, device=device)
        self._columns = torch.arange(longest, device=device)
        self._first = torch.tensor([0.0] + [-1e9] * (beams - 1), device=device)

    def start(self, real: Tensor) -> None:
        """Begin where `real` (B,) is true; the other samples are padding, and done."""
        length = len(self.prompt)
        self._tokens[..., :length] = self.prompt
        self._length.fill_(length)
        self._scores.copy_(self._first.expand_as(self._scores))
        self._finals.fill_(-math.inf)
        self._order.fill_(-1)
        self._failed.zero_()
        self.done.copy_(~real)

    def advance(self, logits: Tensor) -> None:
        """Choose the next tokens by the logits (B, K, V) of the live beams; what done samples have finished stays."""
        batch, beams, vocab = logits.shape
        logprobs = logits.float().log_softmax(-1)
        logprobs[..., self._eos].masked_fill_(self._length < self._search.min_length, -math.inf)
        totals = logprobs.add_(self._scores[..., None]).flatten(1)  # (B, K*V)
        top, ids = totals.topk(2 * beams, dim=1)  # (B, 2K), best first
        parent = ids.div(vocab, rounding_mode="floor")
        token = ids - parent * vocab
        ends = token == self._eos
        failed = ~self.done & top[:, 0].isnan()  # see Sample.advance
        active = ~(self.done | failed)

        # The K best that do not end become the live beams.
        place = (~ends).cumsum(1).sub_(1).masked_fill_(ends, beams).clamp_(max=beams)  # (B, 2K); K: none of them
        chosen = self._ranks.new_zeros(batch, beams + 1).scatter_(1, place, self._ranks.expand(batch, -1))[:, :beams]
        self.parents.copy_(parent.gather(1, chosen))
        self._scores.copy_(top.gather(1, chosen))
        source = torch.cat((self.parents, self._finish(top, parent, ends & active[:, None])), dim=1)  # (B, 2K) rows
        last = token.gather(1, chosen)
        tokens = self._tokens.gather(1, source[..., None].expand_as(self._tokens))
        here = self._columns == self._length  # beyond the length of a finished hypothesis anything may stand
        tokens[:, :beams] = torch.where(here, last[..., None], tokens[:, :beams])
        self._tokens.copy_(tokens)

        self._failed.logical_or_(failed)
        self.done.logical_or_(failed | self._are_done(top[:, 0]))
        self.next.copy_(last.masked_fill_(self.done[:, None], self._pad))
        self._length.add_(1)

    def _finish(self, top: Tensor, parent: Tensor, ends: Tensor) -> Tensor:
        """Add the live beams that end among the first K candidates, as `BeamHypotheses.add`.

        Returns:
            (B, K) the rows that the finished hypotheses now come from.
        """
        slots = self._beams
        count = len(slots)
        finals, order, source = self._finals, self._order, (slots + count).expand_as(self._order)
        scores = top[:, :count].double() / self._length
        orders = self._length * count + slots
        for rank in range(count):
            lowest = finals.amin(1, keepdim=True)
            # The first empty one; if none, the oldest of the lowest.
            slot = torch.where(finals == lowest, order, _NEVER).argmin(1, keepdim=True)
            better = (order.gather(1, slot) < 0) | (scores[:, rank, None] > lowest)
            here = (slots == slot) & better & ends[:, rank, None]  # (B, K)
            finals = torch.where(here, scores[:, rank, None], finals)
            order = torch.where(here, orders[rank], order)
            source = torch.where(here, parent[:, rank, None], source)
        self._finals.copy_(finals)
        self._order.copy_(order)
        return source

    def _are_done(self, best: Tensor) -> Tensor:
        """`Sample._is_done` for all: best (B,) and the scores of the live beams are those of the tokens just chosen."""
        full = self._order.amin(1) >= 0
        worst, finals = self._finals.amin(1), self._finals.amax(1)
        leader = self._scores.amax(1).double()
        settled = (worst >= best.double() / self._length) | (worst >= leader / (self._length + 1))
        # With no hypothesis the best is -inf, and greater than nothing.
        return (full & settled) | (finals > leader / self._search.max_length)

    def samples(self, batch: int) -> list[Sample]:
        """Read the first `batch` searches from the device, as they stand."""
        orders = self._order[:batch].tolist()
        numbers = torch.cat((self._scores.double(), self._finals), 1)[:batch].tolist()
        states = torch.stack((self.done, self._failed), 1)[:batch].tolist()
        length = int(self._length)
        rows = self._tokens[:batch].tolist()
        return [self._sample(length, *found) for found in zip(rows, orders, numbers, states, strict=True)]

    def _sample(
        self, length: int, rows: list[list[int]], orders: list[int], numbers: list[float], state: list[bool]
    ) -> Sample:
        beams = self._search.num_beams
        held = sorted((order, slot) for slot, order in enumerate(orders) if order >= 0)
        sample = Sample([], self._search, self._eos)
        sample.beams = [row[:length] for row in rows[:beams]]
        sample.scores = numbers[:beams]
        sample.finished = [(numbers[beams + slot], rows[beams + slot][: order // beams]) for order, slot in held]
        sample.worst = min((score for score, _ in sample.finished), default=sample.worst)
        sample.done, failed = state
        if failed:
            sample.error = NonFiniteLogitsError()
        elif not sample.done and length == self._search.max_length:
            sample.end()
        return sample


def agrees(device: torch.device, kind: type[DeviceSearch] = DeviceSearch) -> bool:
    """Whether `kind` finds on `device` what beam.py's search finds, with the same scores drawn at random."""
    batch, words, search = 4, 48, Search(num_beams=3, min_length=5, max_length=16)
    eos, pad = 2, 0
    prompt = torch.tensor([3, 4], device=device)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(search.max_length, words, words, generator=generator).mul_(3).to(device)
    steps = iter(range(1, search.max_length))

    def step(tokens: Tensor, _: Tensor) -> Tensor:
        return table[next(steps)][tokens]  # (B, K, V)

    first = table[0][prompt[-1:]].expand(batch, words) + torch.arange(batch, device=device)[:, None] * table[1][0]
    *_, wanted = beam_search(prompt.expand(batch, -1), first, step, search, eos_token_id=eos, pad_token_id=pad)
    tried = kind(batch, search, prompt, eos_token_id=eos, pad_token_id=pad)
    tried.start(torch.ones(batch, dtype=torch.bool, device=device))
    tried.advance(first[:, None].expand(-1, search.num_beams, -1))
    for length in range(1, search.max_length - len(prompt)):
        tried.advance(table[length][tried.next])
    return [sample.tokens for sample in tried.samples(batch)] == [sample.tokens for sample in wanted]
