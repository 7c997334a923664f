import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from blip.engine.beam import NonFiniteLogitsError, Sample, Search, beam_search

PAD = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """A decoder that looks its scores up by all that came before, and what is asked of the search."""

    table: Tensor  # (rows, V)
    prompt: Tensor  # (B, P)
    search: Search
    eos_token_id: int

    def logits(self, tokens: Tensor) -> Tensor:
        """(..., T) -> (..., V)."""
        state = torch.zeros(tokens.shape[:-1], dtype=torch.long)
        for column in tokens.unbind(-1):
            state = (state * 1103515245 + column * 2654435761 + 12345) % 2147483647
        return self.table[state % len(self.table)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    vocab = draw(st.integers(2, 12))
    batch = draw(st.integers(1, 6))
    prompt_length = draw(st.integers(1, 4))
    max_length = prompt_length + draw(st.integers(1, 12))
    eos_token_id = draw(st.integers(0, vocab - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    table = torch.randn(257, vocab, generator=generator) * draw(st.sampled_from([0.01, 0.5, 2.0, 8.0]))
    table[:, eos_token_id] += draw(st.sampled_from([-4.0, -1.0, 0.0, 1.0, 3.0, 8.0]))
    if draw(st.booleans()):
        table = table.round()  # equal scores everywhere
    if draw(st.integers(0, 4)) == 0:
        impossible = torch.rand(table.shape, generator=generator) < 0.2
        impossible[:, draw(st.integers(0, vocab - 1))] = False
        table = table.masked_fill(impossible, -math.inf)
    return Case(
        table=table,
        prompt=torch.randint(0, 1000, (batch, prompt_length), generator=generator),
        search=Search(draw(st.integers(1, 5)), draw(st.integers(0, max_length)), max_length),
        eos_token_id=eos_token_id,
    )


class TableModel(PreTrainedModel):
    """A Case as transformers sees it."""

    def __init__(self, case: Case) -> None:
        super().__init__(PretrainedConfig())
        self.case = case
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # tells the library the device

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return CausalLMOutput(logits=self.case.logits(input_ids)[:, None])

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": input_ids}


def searched(case: Case, history: list[list[list[int]]] | None = None, poison: Tensor | None = None) -> list[Sample]:
    """Our search; `history` takes what is settled after each step, `poison` (B, V) is added to one beam's scores."""
    sequences = case.prompt[:, None].expand(-1, case.search.num_beams, -1)

    def step(tokens: Tensor, parents: Tensor) -> Tensor:
        nonlocal sequences
        past = sequences.gather(1, parents[..., None].expand_as(sequences))
        sequences = torch.cat([past, tokens[..., None]], dim=-1)
        logits = case.logits(sequences)
        if poison is not None:
            logits[:, -1] += poison
        return logits

    samples: list[Sample] = []
    for samples in beam_search(
        case.prompt,
        case.logits(case.prompt),
        step,
        case.search,
        eos_token_id=case.eos_token_id,
        pad_token_id=PAD,
    ):
        if history is not None:
            history.append([sample.settled() for sample in samples])
    return samples


def alone(case: Case, index: int) -> Case:
    return dataclasses.replace(case, prompt=case.prompt[index : index + 1])


compared = 0


@settings(max_examples=900, deadline=None, derandomize=True)
@given(cases())
def test_every_sample_gets_the_tokens_that_transformers_gives_it(case: Case) -> None:
    global compared
    rows = TableModel(case).generate(
        case.prompt,
        max_length=case.search.max_length,
        min_length=case.search.min_length,
        num_beams=case.search.num_beams,
        eos_token_id=case.eos_token_id,
        pad_token_id=PAD,
    )
    for sample, row in zip(searched(case), rows.tolist(), strict=True):
        assert sample.error is None
        assert row == sample.tokens + [PAD] * (len(row) - len(sample.tokens))
        compared += 1


def test_at_least_two_thousand_samples_were_compared_with_transformers() -> None:
    if compared == 0:
        pytest.skip("counts what the test before it compared")
    assert compared >= 2000


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_a_sample_finds_the_same_tokens_alone_and_in_a_batch(case: Case) -> None:
    together = [sample.tokens for sample in searched(case)]
    assert together == [searched(alone(case, index))[0].tokens for index in range(len(together))]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases())
def test_settled_tokens_only_grow_and_end_as_the_outcome(case: Case) -> None:
    history: list[list[list[int]]] = []
    outcome = [sample.tokens for sample in searched(case, history)]
    assert history[-1] == outcome
    for earlier, later in itertools.pairwise(history):
        for before, after in zip(earlier, later, strict=True):
            assert after[: len(before)] == before


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases(), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 5))
def test_scores_that_are_not_finite_fail_their_own_sample_and_no_other(case: Case, value: float, index: int) -> None:
    index %= len(case.prompt)
    poison = torch.zeros(len(case.prompt), case.table.shape[1])
    poison[index] = value
    expected = [sample.tokens for sample in searched(case)]
    samples = searched(case, poison=poison)
    for position, sample in enumerate(samples):
        assert sample.done
        if position != index:
            assert sample.error is None
            assert sample.tokens == expected[position]
        elif sample.error is None:  # the first step decided the outcome, so that there was no second
            assert sample.tokens == expected[position]
        else:
            assert isinstance(sample.error, NonFiniteLogitsError)
            assert sample.settled() == []


def test_what_all_beams_share_is_settled_long_before_the_search_is_done() -> None:
    # After any token t the decoder is sure of token t + 1; only the last of the words is in doubt.
    table = torch.full((10, 10), -20.0)
    for token in range(9):
        table[token, token + 1] = 20.0
    history: list[list[int]] = []
    for (sample,) in beam_search(
        torch.tensor([[1]]),
        table[torch.tensor([1])],
        lambda tokens, _: table[tokens],
        Search(num_beams=3, min_length=0, max_length=9),
        eos_token_id=9,
        pad_token_id=PAD,
    ):
        history.append(sample.settled())
    assert history[-1] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert any(1 < len(settled) < 9 for settled in history)


def test_a_prompt_that_leaves_no_room_is_refused_with_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^The prompt has 3 tokens and the result may have no more than 3\.$"):
        next(
            beam_search(
                torch.ones(1, 3, dtype=torch.long),
                torch.zeros(1, 4),
                lambda tokens, _: torch.zeros(*tokens.shape, 4),
                Search(num_beams=3, min_length=0, max_length=3),
                eos_token_id=1,
                pad_token_id=PAD,
            )
        )
