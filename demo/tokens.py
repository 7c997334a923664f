"""Texts as rows of token ids: one to a row, or several about the same picture packed into one row."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Several texts per picture in one row, so that cross-attention reads each picture once.

    `ids`, `positions` (pictures, tokens) and `mask` (pictures, tokens, tokens), which keeps the
    texts of a row apart, go to the encoder; `index` finds the tokens of each text in its flattened
    output and `text_mask` says which are there, both (texts, longest text).
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    index: Tensor
    text_mask: Tensor

    def encode(self, encoder: Any, features: Tensor) -> Tensor:
        """The encoder's states of each text that looks at its picture, (texts, longest, width)."""
        states = encoder(
            self.ids, self.mask, position_ids=self.positions, encoder_hidden_states=features
        ).last_hidden_state.flatten(0, 1)
        found: Tensor = states.index_select(0, self.index.flatten())
        return found.view(*self.index.shape, -1)


class Words:
    """Text to token ids, equal to the tokenizer's but with every word looked up once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._word = functools.cache(lambda word: tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word)))

    def row(self, text: str, first: int) -> list[int]:
        """The ids of a text, from the token `first` to [SEP]."""
        found = [word for part in re.findall(r"\w+|[^\w\s]", text) for word in self._word(part)]
        return [first, *found, self.tokenizer.sep_token_id]

    def padded(self, texts: Sequence[str], first: int) -> tuple[Tensor, Tensor]:
        """Ids and attention mask of the texts, both (texts, tokens)."""
        ids = _padded([self.row(text, first) for text in texts])
        return ids, (ids != self.tokenizer.pad_token_id).long()

    def packed(self, groups: Sequence[Sequence[str]], first: int) -> Packed:
        """Pack each group of texts into one row, one after the other."""
        ids, positions, owners, index = [], [], [], []
        rows = [[self.row(text, first) for text in group] for group in groups]
        width = max(sum(map(len, group)) for group in rows)
        for k, group in enumerate(rows):
            ids.append([token for row in group for token in row])
            positions.append([place for row in group for place in range(len(row))])
            owners.append([number for number, row in enumerate(group, 1) for _ in row])
            start = k * width
            for row in group:
                index.append(list(range(start, start + len(row))))
                start += len(row)
        owner = _padded(owners)
        lengths = torch.tensor([len(places) for places in index])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return Packed(
            _padded(ids),
            _padded(positions),
            (owner[:, :, None] == owner[:, None, :]).long(),
            _padded(index),
            mask.long(),
        )


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
