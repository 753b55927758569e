"""Context tables: logits that the last few tokens select, added to the network's and trained together with it.

    order 2 (bigram)     the row of the current token
    order 3 (trigram)    the row of the last two tokens: previous · V + current
    order n              the row of the last n - 1 tokens, read as a number in base V, oldest token first

A table of order n has V^(n-1) rows, or `table_buckets` if that is fewer: then contexts share rows by a hash. Tables
learn short contexts in a few hundred steps, so that the network can learn longer ones.

Shapes: B batch, T time, V vocabulary, n the largest order.

Source: Mikolov et al. 2011, "Strategies for Training Large Scale Neural Network Language Models" (a network and a
hashed n-gram model trained jointly).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor, nn

from lm.config import listed
from lm.errors import ConfigError
from lm.kernels import layers
from lm.models.base import ModelOptions, State
from lm.models.layout import Stage, Symbol

MAX_NUMBERS = 1 << 28
"""In all tables of a model: one gigabyte of float32."""
_FACTOR, _BITS = 1_540_483_477, 0xFFFF_FFFF
RECENT = "recent"
"""The state's tensor of earlier tokens, (B, n - 2) int64, oldest first; -1 before the start of the text."""
ROWS = "table rows"
"""The host input: the row of each table at each position, (number of tables, B, T) int64."""

Array = npt.NDArray[np.int64]


class TableOptions(ModelOptions):
    """Options of models that may have context tables."""

    table_orders: Annotated[tuple[Annotated[int, Field(ge=2, le=16)], ...], BeforeValidator(listed)] = Field(
        (),
        description="Context tables that are added to the logits: 2 depends on the last token, 3 on the last two, …; "
        "for small vocabularies.",
    )
    table_buckets: int = Field(
        65_536, ge=1, le=1 << 30, description="Maximum number of rows of a table; more contexts share rows by a hash."
    )
    table_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout probability of a row in training, for each table and position. Use more for more epochs.",
    )

    @field_validator("table_orders")
    @classmethod
    def _orders_rise(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("name each order once")
        return tuple(sorted(value))


class ContextTable(layers.Embedding):
    """The table of one order. On the CPU its gradients are sparse, because a step uses few rows.

    On a GPU they are dense: as much memory as the table, at most a gigabyte for all tables (`MAX_NUMBERS`).
    """

    optimizer_kind = "row_adagrad"
    stays_fp32 = True
    shardable = False


class ContextTables(nn.ModuleDict):
    """The tables of a model by order; all zero at first, so that training starts with the network alone."""

    def __init__(self, options: TableOptions, vocab_size: int) -> None:
        super().__init__()
        self.orders, self.buckets, self.vocab_size = options.table_orders, options.table_buckets, vocab_size
        self.dropout = options.table_dropout
        self.num_earlier = max((2, *self.orders)) - 2
        """Tokens before the current one that a row depends on."""
        if (numbers := sum(self.rows(order) for order in self.orders) * vocab_size) > MAX_NUMBERS:
            raise ConfigError(
                f"table_orders {list(self.orders)}: {numbers:,} numbers for a vocabulary of {vocab_size:,}; the "
                f"maximum is {MAX_NUMBERS:,}. Context tables are for small vocabularies: lower table_buckets, or turn "
                "them off with table_orders=[]."
            )
        for order in self.orders:
            rows = self.rows(order)
            # The last row is for positions with too few tokens before them: it stays zero.
            zeros = torch.zeros(rows + 1, vocab_size)
            make: Any = ContextTable.from_pretrained
            self[str(order)] = make(zeros, freeze=False, padding_idx=rows, sparse=True)

    def rows(self, order: int) -> int:
        """Rows of the table of an order, without the last one, which stays zero."""
        contexts: int = self.vocab_size ** (order - 1)
        return min(contexts, self.buckets)

    def forward(
        self, ids: Tensor, before: State | None, after: State, host_inputs: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor | None, State]:
        """The logits to add to the network's, and the network's state with the tokens that the tables need.

        Args:
            ids: (B, T) int64, the network's input.
            before: the state before `ids`; None at the start of a text.
            after: the network's state after `ids`.
            host_inputs: with the result of `host_inputs`; None: the rows are computed here.

        Returns:
            (B, T, V), None without tables; and the state.
        """
        if not self.orders:
            return None, after
        text = self._text(ids, before)
        if self.num_earlier:
            after = replace(after, tensors={**after.tensors, RECENT: text[:, text.shape[1] - self.num_earlier :]})
        if host_inputs is None:
            contexts = self.contexts(text, ids.shape[1])
        else:
            contexts = dict(zip(self.orders, host_inputs[ROWS].unbind(), strict=True))
        parts = [self._look_up(order, rows) for order, rows in contexts.items()]
        added = sum(parts[1:], start=parts[0])
        return added / (1 - self.dropout) if self.training and self.dropout else added, after

    def host_inputs(self, ids: Array, earlier: Array | None) -> dict[str, Tensor]:
        """`ROWS`, if there are tables: about 15 operators for each order, which a GPU need not launch.

        Arguments as in `LanguageModel.host_inputs`.
        """
        if not self.orders:
            return {}
        text = np.full((len(ids), self.num_earlier + ids.shape[1]), -1, dtype=np.int64)
        text[:, self.num_earlier :] = ids
        if earlier is not None and (known := min(self.num_earlier, earlier.shape[1])):
            text[:, self.num_earlier - known : self.num_earlier] = earlier[:, earlier.shape[1] - known :]
        return {ROWS: torch.stack([*self.contexts(torch.from_numpy(text), ids.shape[1]).values()])}

    def contributions(self, ids: Tensor, before: State | None) -> dict[str, Tensor]:
        """What each table adds to the logits (B, T, V), by name: "table 2", …; without dropout."""
        if not self.orders:
            return {}
        contexts = self.contexts(self._text(ids, before), ids.shape[1])
        return {f"table {order}": self[str(order)](rows) for order, rows in contexts.items()}

    def _text(self, ids: Tensor, before: State | None) -> Tensor:
        """The tokens (B, num_earlier + T) that rows of `ids` depend on; -1 before the start of the text."""
        if not self.num_earlier:
            return ids
        if before is None:
            recent = torch.full((ids.shape[0], self.num_earlier), -1, dtype=torch.int64, device=ids.device)
        else:
            recent = before.tensors[RECENT]
        return torch.cat([recent, ids], dim=1)

    def _look_up(self, order: int, rows: Tensor) -> Tensor:
        if self.training and self.dropout:
            # A dropped position gets the row that is zero.
            rows = torch.where(torch.rand(rows.shape, device=rows.device) < self.dropout, self.rows(order), rows)
        logits: Tensor = self[str(order)](rows)
        return logits

    def contexts(self, text: Tensor, time: int) -> dict[int, Tensor]:
        """The rows (B, T) of each order for the last T tokens of `text` (B, num_earlier + T)."""
        rows = {}
        digits = hashed = torch.zeros(text.shape[0], time, dtype=torch.int64, device=text.device)
        complete = torch.ones(text.shape[0], time, dtype=torch.bool, device=text.device)
        for back in range(self.num_earlier + 1):
            token = text[:, self.num_earlier - back : self.num_earlier - back + time]
            complete = complete & (token >= 0)
            order, contexts = back + 2, self.vocab_size ** (back + 1)
            if contexts <= self.buckets:
                digits = digits + token * self.vocab_size**back
            hashed = mix(hashed, token)
            if order in self.orders:
                row = digits if contexts <= self.buckets else bucket(hashed, self.buckets)
                rows[order] = torch.where(complete, row, self.rows(order))
        return rows

    def symbols(self) -> dict[str, Symbol]:
        """See `LanguageModel.symbols`."""
        return {f"R{order}": Symbol(self.rows(order), f"rows of the table of order {order}") for order in self.orders}

    def stages(self, prefix: str) -> list[Stage]:
        """See `LanguageModel.layout`; `prefix` is that of the parameters' names."""
        if not self.orders:
            return []
        rows = {f"{prefix}{order}.weight": (f"R{order} + 1", "V") for order in self.orders}
        return [Stage("tables", "sum of one row a table", rows, {"table logits": ("B", "T", "V")})]


def mix(hashed: Tensor, token: Tensor) -> Tensor:
    """The hash of 32 bits after one more token, from 0 and the current token backwards; the same as in the kernels."""
    return (hashed * _FACTOR + token + 1) & _BITS


def bucket(hashed: Tensor, buckets: int) -> Tensor:
    """The row of a hash: its bits are mixed before the modulo."""
    hashed = ((hashed ^ (hashed >> 15)) * _FACTOR) & _BITS
    return (hashed ^ (hashed >> 13)) % buckets
