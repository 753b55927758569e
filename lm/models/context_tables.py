"""Context tables: logits looked up by the last few tokens, added to a network's own and learned together with it.

    order 2 (bigram)     the row of the current token
    order 3 (trigram)    the row of the two last tokens: previous · V + current
    order n              the row of the n - 1 last tokens, read as digits of one number in base V, oldest first

A table of order n has V^(n-1) rows, or `table_buckets` where that is fewer: contexts then share rows by a hash. Tables
learn in a few hundred steps what a network needs minutes for, and leave to it what lies further back.

Shapes: B batch, T time, V vocabulary, n the largest order.

Sources: Mikolov et al. 2011, "Strategies for Training Large Scale Neural Network Language Models" (a network and a
hashed n-gram model trained jointly).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from lm.config import listed
from lm.errors import ConfigError
from lm.models.base import ModelOptions, State

MOST_NUMBERS = 1 << 28
"""In all tables of a model: a gigabyte in float32."""
_FACTOR, _BITS = 1_540_483_477, 0xFFFF_FFFF
RECENT = "recent"
"""The state's tokens, (B, n - 2) int64, oldest first; -1 where the text has not begun."""


class TableOptions(ModelOptions):
    """Options of models that may have context tables."""

    table_orders: tuple[Annotated[int, Field(ge=2, le=16)], ...] = Field(
        (),
        description="Context tables added to the logits: 2 looks the last token up, 3 the last two, …; for small "
        "vocabularies.",
    )
    table_buckets: int = Field(
        65_536, ge=1, le=1 << 30, description="The most rows of a table; with more contexts than that, they share rows."
    )
    table_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the rows looked up, of each table by itself, that is left out in training: the more, the "
        "more often the text is read.",
    )

    @field_validator("table_orders", mode="before")
    @classmethod
    def _orders_from_text(cls, value: Any) -> Any:
        return listed(value)

    @field_validator("table_orders")
    @classmethod
    def _orders_rise(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("name each order once")
        return tuple(sorted(value))


class ContextTables(nn.ModuleDict):
    """The tables of a model, by order; all zero at first, so that training starts at the plain model."""

    def __init__(self, options: TableOptions, vocab_size: int) -> None:
        super().__init__()
        self.orders, self.buckets, self.vocab_size = options.table_orders, options.table_buckets, vocab_size
        self.dropout = options.table_dropout
        self.held = max((2, *self.orders)) - 2
        """Earlier tokens that a row depends on."""
        if (numbers := sum(self.rows(order) for order in self.orders) * vocab_size) > MOST_NUMBERS:
            raise ConfigError(
                f"table_orders {list(self.orders)}: {numbers:,} numbers for a vocabulary of {vocab_size:,}, more "
                f"than {MOST_NUMBERS:,}. Context tables are for small vocabularies: lower table_buckets, or leave them "
                "out with table_orders=[]."
            )
        for order in self.orders:
            rows = self.rows(order)
            # The last row stands for a context that is not whole yet: it stays zero. Gradients are sparse: a step
            # meets few of the rows, and the others must cost it nothing.
            empty = torch.zeros(rows + 1, vocab_size)
            self[str(order)] = nn.Embedding.from_pretrained(empty, freeze=False, padding_idx=rows, sparse=True)

    def rows(self, order: int) -> int:
        """Rows of the table of an order, without the one for contexts that are not whole."""
        contexts: int = self.vocab_size ** (order - 1)
        return min(contexts, self.buckets)

    def forward(self, ids: Tensor, before: State | None, after: State) -> tuple[Tensor | None, State]:
        """What to add to the network's logits, (B, T, V) or None, and the state with what the tables keep.

        Args:
            ids: (B, T) int64, what the network has read.
            before: the state that it began from; None at the start of a text.
            after: its state after them.
        """
        if not self.orders:
            return None, after
        text = ids
        if self.held:
            if before is None:
                recent = torch.full((len(ids), self.held), -1, dtype=torch.int64, device=ids.device)
            else:
                recent = before.tensors[RECENT]
            text = torch.cat([recent, ids], dim=1)
            after = replace(after, tensors={**after.tensors, RECENT: text[:, text.shape[1] - self.held :]})
        parts = [self._look_up(order, rows) for order, rows in self.contexts(text, ids.shape[1]).items()]
        added = sum(parts[1:], start=parts[0])
        return added / (1 - self.dropout) if self.training and self.dropout else added, after

    def _look_up(self, order: int, rows: Tensor) -> Tensor:
        if self.training and self.dropout:
            # The row of unwhole contexts, which is zero and stays so.
            rows = torch.where(torch.rand(rows.shape, device=rows.device) < self.dropout, self.rows(order), rows)
        logits: Tensor = self[str(order)](rows)
        return logits

    def contexts(self, text: Tensor, time: int) -> dict[int, Tensor]:
        """The rows (B, T) of each order for the last T tokens of `text` (B, held + T)."""
        found = {}
        digits = hashed = torch.zeros(len(text), time, dtype=torch.int64, device=text.device)
        whole = torch.ones(len(text), time, dtype=torch.bool, device=text.device)
        for back in range(self.held + 1):
            token = text[:, self.held - back : self.held - back + time]
            whole = whole & (token >= 0)
            order, contexts = back + 2, self.vocab_size ** (back + 1)
            if contexts <= self.buckets:
                digits = digits + token * self.vocab_size**back
            hashed = mix(hashed, token)
            if order in self.orders:
                row = digits if contexts <= self.buckets else bucket(hashed, self.buckets)
                found[order] = torch.where(whole, row, self.rows(order))
        return found


def mix(hashed: Tensor, token: Tensor) -> Tensor:
    """A hash of 32 bits, one token further; from 0, the current token first. The native step computes the same."""
    return (hashed * _FACTOR + token + 1) & _BITS


def bucket(hashed: Tensor, buckets: int) -> Tensor:
    """The row of a hash: its bits are spread over one another before the remainder is taken."""
    hashed = ((hashed ^ (hashed >> 15)) * _FACTOR) & _BITS
    return (hashed ^ (hashed >> 13)) % buckets
