"""Beam search over token ids, for batches: the search that LAVIS or Hugging Face's BLIP asks of transformers.

There are two sets of rules, both with length penalty 1 and early stopping off:

- "lavis": `GenerationMixin.beam_search`, `BeamSearchScorer` and `BeamHypotheses` of release 4.26.1, which LAVIS uses. A
  hypothesis is as long as its prompt and its words.
- "transformers": `GenerationMixin._beam_search` of releases 4.50 to 5.23. Its length is that of its words and its end
  token; the prompt does not count. Of equal hypotheses the first found wins, not the last.

One beam is greedy search in both: the likeliest token, until it is the end token. Each sample follows the rules on its
own, so that neither its result nor its failure depends on the batch. Whatever produces the logits is behind one
callable.
"""

import ctypes
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: (tokens (B, K), parents (B, K)) -> logits (B, K, V): beam j of a sample continues its beam parents[j] with tokens[j].
Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Search:
    """The settings of a search. Lengths are in tokens and include the prompt.

    Attributes:
        num_beams: K, hypotheses kept per sample; 1 is greedy search.
        min_length: below it the end token is not chosen.
        max_length: of the longest result.
        rules: whose, "lavis" or "transformers".
    """

    num_beams: int
    min_length: int
    max_length: int
    rules: str = "lavis"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Search":
        """The settings as a bundle's config.json has them."""
        rules = config.get("library", "lavis")
        return cls(config["num_beams"], config["min_length"], config["max_length"], rules)

    def length(self, tokens: int, prompt: int, *, ended: bool) -> int:
        """The length of a hypothesis by the rules, of its tokens without the end token, and of those in the prompt."""
        return tokens if self.rules == "lavis" else tokens + ended - prompt

    def score(self, sum_logprobs: float, length: int) -> float:
        """The score of a hypothesis: its mean log probability, in the precision in which the rules compare it."""
        score = sum_logprobs / length
        return score if self.rules == "lavis" else ctypes.c_float(score).value


class NonFiniteLogitsError(RuntimeError):
    """The model's scores for one sample contain NaN or infinity, so there is nothing to choose by."""

    def __init__(self) -> None:
        super().__init__("The model's scores for this input are not finite numbers.")


class Sample:
    """The search for one sample: its live beams, its finished hypotheses and, once `done`, its outcome or `error`."""

    def __init__(self, prompt: list[int], search: Search, eos_token_id: int) -> None:
        self.search = search
        self.eos_token_id = eos_token_id
        self._prompt = len(prompt)
        self.beams = [prompt] * search.num_beams
        # One beam counts at first, or the same token would be chosen for all of them.
        self.scores = [0.0] + [-1e9] * (search.num_beams - 1)
        self.parents = list(range(search.num_beams))
        self.finished: list[tuple[float, list[int]]] = []
        self.worst = 1e9
        self.done = False
        self.error: NonFiniteLogitsError | None = None

    @property
    def tokens(self) -> list[int]:
        """The outcome: prompt, new tokens and, where it fits, the end token. For a sample `done` without `error`."""
        _, best = self._best()
        return [*best, self.eos_token_id] if len(best) < self.search.max_length else best

    def settled(self) -> list[int]:
        """The longest prefix that all possible outcomes share; it never shrinks from step to step.

        Possible outcomes are the best finished hypothesis and every live beam that can still reach its score. A sum
        of log probabilities only falls, so with the longest length it is an upper bound of a beam's final score.
        """
        if self.error is not None:
            return []
        if self.done:
            return self.tokens
        if not self.finished:
            return _common_prefix(self.beams)
        best_score, best = self._best()
        scored = zip(self.beams, self.scores, strict=True)
        return _common_prefix([best, *(beam for beam, total in scored if self._score_at_last(total) >= best_score)])

    def advance(self, candidates: list[tuple[float, int, int]]) -> None:
        """Take the 2K best continuations, best first: summed log probability, token, beam that it continues."""
        best_score = candidates[0][0]
        # torch.topk ranks NaN above every number. One NaN or +inf in a row of logits, or nothing but -inf, makes its
        # log-softmax NaN, so checking the first candidate is enough.
        if math.isnan(best_score):
            self.error = NonFiniteLogitsError()
            self.done = True
            return
        length = len(self.beams[0])
        chosen: list[tuple[float, int, int]] = []
        for rank, (score, token, parent) in enumerate(candidates):
            if token != self.eos_token_id:
                chosen.append((score, token, parent))
            elif rank < self.search.num_beams:
                self._finish(self.beams[parent], score, ended=True)
            if len(chosen) == self.search.num_beams:
                break
        self.beams = [[*self.beams[parent], token] for _, token, parent in chosen]
        self.scores = [score for score, _, _ in chosen]
        self.parents = [parent for _, _, parent in chosen]
        self.done = self._is_done(best_score, length)
        if not self.done and length + 1 == self.search.max_length:
            self.end()

    def end(self) -> None:
        """Finish the live beams, which are as long as they may be."""
        for beam, score in zip(self.beams, self.scores, strict=True):
            self._finish(beam, score, ended=False)
        self.done = True

    def _is_done(self, best_score: float, length: int) -> bool:
        if self.search.num_beams == 1:
            return bool(self.finished)
        full = len(self.finished) == self.search.num_beams
        if self.search.rules == "lavis" and full and self.worst >= best_score / length:
            return True  # the rule of BeamHypotheses.is_done
        # Here this is the rule of transformers; LAVIS's search goes on, to the same outcome, although no later
        # hypothesis can enter the list.
        leader = max(self.scores)
        if full and self.worst >= self._score(leader, length + 1, ended=False):
            return True
        # Neither stops here, although no later hypothesis can win.
        return bool(self.finished) and self._best()[0] > self._score_at_last(leader)

    def _finish(self, tokens: list[int], sum_logprobs: float, *, ended: bool) -> None:
        """`BeamHypotheses.add`, or what `_update_finished_beams` does for one of them."""
        score = self._score(sum_logprobs, len(tokens), ended=ended)
        if len(self.finished) < self.search.num_beams:
            self.finished.append((score, tokens))
            self.worst = min(score, self.worst)
        elif score > self.worst:
            self.finished.append((score, tokens))
            order = sorted((kept, index) for index, (kept, _) in enumerate(self.finished))
            del self.finished[order[0][1]]
            self.worst = order[1][0]

    def _score(self, sum_logprobs: float, tokens: int, *, ended: bool) -> float:
        return self.search.score(sum_logprobs, self.search.length(tokens, self._prompt, ended=ended))

    def _score_at_last(self, sum_logprobs: float) -> float:
        """The best that a beam with this sum can reach."""
        return self._score(sum_logprobs, self.search.max_length, ended=False)

    def _best(self) -> tuple[float, list[int]]:
        # Among equal scores LAVIS's stable sort and pop() take the one added last.
        hypotheses = reversed(self.finished) if self.search.rules == "lavis" else self.finished
        return max(hypotheses, key=lambda hypothesis: hypothesis[0])


def beam_search(
    prompt: Tensor,
    logits: Tensor,
    step: Step,
    search: Search,
    *,
    eos_token_id: int,
    pad_token_id: int,
) -> Iterator[list[Sample]]:
    """Search a batch; after every token yield the B samples, always the same objects, until all are done.

    A sample whose logits are not finite is done with its `error` set; the others are not affected.

    Args:
        prompt: (B, P) token ids.
        logits: (B, V), the decoder's output for the last prompt token.
        step: gives the logits that follow the tokens chosen; done samples stay in it as padding.
        search: beams and lengths.
        eos_token_id: the end token.
        pad_token_id: the token given to done samples.

    Raises:
        ValueError: the prompt leaves no room below max_length.
    """
    batch, prompt_length = prompt.shape
    num_beams, max_length = search.num_beams, search.max_length
    vocab = logits.shape[-1]
    if prompt_length >= max_length:
        raise ValueError(f"The prompt has {prompt_length} tokens and the result may have no more than {max_length}.")
    assert logits.shape == (batch, vocab), logits.shape

    samples = [Sample(row, search, eos_token_id) for row in prompt.tolist()]
    logits = logits[:, None].expand(batch, num_beams, vocab)
    for length in range(prompt_length, max_length):
        assert logits.shape == (batch, num_beams, vocab), logits.shape
        beam_scores = torch.tensor([sample.scores for sample in samples], device=logits.device)  # (B, K)
        totals = ranked(logits, beam_scores, search)  # (B, K, V)
        if length < search.min_length:
            totals[..., eos_token_id] = -math.inf
        top_scores, top_ids = best(totals)  # (B, 2K)
        for sample, scores, ids in zip(samples, top_scores.tolist(), top_ids.tolist(), strict=True):
            if not sample.done:
                sample.advance([(score, i % vocab, i // vocab) for score, i in zip(scores, ids, strict=True)])
        yield samples
        if all(sample.done for sample in samples):
            return
        tokens = [[pad_token_id if sample.done else beam[-1] for beam in sample.beams] for sample in samples]
        parents = [sample.parents for sample in samples]
        tokens_parents = torch.tensor([tokens, parents], device=logits.device)  # (2, B, K): one copy to the device
        logits = step(tokens_parents[0], tokens_parents[1])


def ranked(logits: Tensor, beam_scores: Tensor, search: Search) -> Tensor:
    """What continuations are chosen by, (B, K, V) in memory of its own: sums of log probabilities.

    Greedy search compares the logits themselves, as the originals do: sums of two words may round to the same number.
    They are NaN where their log-softmax would be.
    """
    if search.num_beams == 1:
        logits = logits.float()
        return logits.masked_fill(~logits.amax(-1, keepdim=True).isfinite(), math.nan)
    return logits.float().log_softmax(-1).add_(beam_scores[..., None])


def best(totals: Tensor) -> tuple[Tensor, Tensor]:
    """The 2K best of (B, K, V), the best first: their values and their places in (B, K*V).

    Of equal ones any comes first, as in the originals; but of one beam the first, as argmax takes it.
    """
    flat = totals.flatten(1)
    values, places = flat.topk(2 * totals.shape[1], dim=1)
    if totals.shape[1] == 1:
        first = flat.argmax(1, keepdim=True)
        places = torch.cat((first, torch.where(places[:, 1:] == first, places[:, :1], places[:, 1:])), dim=1)
    return values, places


def _common_prefix(rows: list[list[int]]) -> list[int]:
    length = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return rows[0][:length]
