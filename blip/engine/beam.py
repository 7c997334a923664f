"""Beam search over token ids, for batches: the search that LAVIS asks of transformers 4.26.1, and nothing else.

The rules are those of `GenerationMixin.beam_search`, `BeamSearchScorer` and `BeamHypotheses` of that release, with
length penalty 1 and early stopping off. Each sample follows them on its own, so that neither its result nor its failure
depends on the batch. Whatever produces the logits is behind one callable.
"""

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
        num_beams: K, hypotheses kept per sample; at least 2.
        min_length: below it the end token is not chosen.
        max_length: of the longest result.
    """

    num_beams: int
    min_length: int
    max_length: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Search":
        """The settings as a bundle's config.json has them."""
        return cls(config["num_beams"], config["min_length"], config["max_length"])


class NonFiniteLogitsError(RuntimeError):
    """The model's scores for one sample contain NaN or infinity, so there is nothing to choose by."""

    def __init__(self) -> None:
        super().__init__("The model's scores for this input are not finite numbers.")


class Sample:
    """The search for one sample: its live beams, its finished hypotheses and, once `done`, its outcome or `error`."""

    def __init__(self, prompt: list[int], search: Search, eos_token_id: int) -> None:
        self.num_beams = search.num_beams
        self.max_length = search.max_length
        self.eos_token_id = eos_token_id
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
        return [*best, self.eos_token_id] if len(best) < self.max_length else best

    def settled(self) -> list[int]:
        """The longest prefix that all possible outcomes share; it never shrinks from step to step.

        Possible outcomes are the best finished hypothesis and every live beam that can still reach its score. A sum
        of log probabilities only falls, so sum / max_length is an upper bound of a beam's final score sum / length.
        """
        if self.error is not None:
            return []
        if self.done:
            return self.tokens
        if not self.finished:
            return _common_prefix(self.beams)
        best_score, best = self._best()
        scored = zip(self.beams, self.scores, strict=True)
        return _common_prefix([best, *(beam for beam, score in scored if score / self.max_length >= best_score)])

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
            elif rank < self.num_beams:
                self._finish(self.beams[parent], score)
            if len(chosen) == self.num_beams:
                break
        self.beams = [[*self.beams[parent], token] for _, token, parent in chosen]
        self.scores = [score for score, _, _ in chosen]
        self.parents = [parent for _, _, parent in chosen]
        self.done = self._is_done(best_score, length)
        if not self.done and length + 1 == self.max_length:
            self.end()

    def end(self) -> None:
        """Finish the live beams, which are as long as they may be."""
        for beam, score in zip(self.beams, self.scores, strict=True):
            self._finish(beam, score)
        self.done = True

    def _is_done(self, best_score: float, length: int) -> bool:
        full = len(self.finished) == self.num_beams
        if full and self.worst >= best_score / length:
            return True  # the rule of BeamHypotheses.is_done
        # The original goes on here, to the same outcome, although no later hypothesis can enter the list or win.
        leader = max(self.scores)
        if full and self.worst >= leader / (length + 1):
            return True
        return bool(self.finished) and self._best()[0] > leader / self.max_length

    def _finish(self, tokens: list[int], sum_logprobs: float) -> None:
        """`BeamHypotheses.add`."""
        score = sum_logprobs / len(tokens)
        if len(self.finished) < self.num_beams:
            self.finished.append((score, tokens))
            self.worst = min(score, self.worst)
        elif score > self.worst:
            self.finished.append((score, tokens))
            (_, dropped), (self.worst, _), *_ = sorted((kept, index) for index, (kept, _) in enumerate(self.finished))
            del self.finished[dropped]

    def _best(self) -> tuple[float, list[int]]:
        # Among equal scores the original's stable sort and pop() take the one added last.
        return max(reversed(self.finished), key=lambda hypothesis: hypothesis[0])


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
        ValueError: the prompt leaves no room below max_length, or there are fewer than two beams.
    """
    batch, prompt_length = prompt.shape
    num_beams, max_length = search.num_beams, search.max_length
    vocab = logits.shape[-1]
    if prompt_length >= max_length:
        raise ValueError(f"The prompt has {prompt_length} tokens and the result may have no more than {max_length}.")
    if num_beams < 2:
        raise ValueError(f"Beam search needs at least 2 beams, not {num_beams}.")
    assert logits.shape == (batch, vocab), logits.shape

    samples = [Sample(row, search, eos_token_id) for row in prompt.tolist()]
    logits = logits[:, None].expand(batch, num_beams, vocab)
    for length in range(prompt_length, max_length):
        assert logits.shape == (batch, num_beams, vocab), logits.shape
        logprobs = logits.float().log_softmax(-1)  # (B, K, V)
        if length < search.min_length:
            logprobs[..., eos_token_id] = -math.inf
        beam_scores = torch.tensor([sample.scores for sample in samples], device=logits.device)  # (B, K)
        totals = (logprobs + beam_scores[..., None]).flatten(1)  # (B, K*V)
        top_scores, top_ids = totals.topk(2 * num_beams, dim=1)  # (B, 2K), best first
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


def _common_prefix(rows: list[list[int]]) -> list[int]:
    length = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return rows[0][:length]
