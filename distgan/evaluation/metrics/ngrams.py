"""Divergence of generated text from real text in character n-grams, n = 1 to 4.

Gulrajani et al. 2017 (released code, `gan_language.py`): the Jensen-Shannon divergence, in bits, of the distributions
of n characters in a row, within a line, padding included and without smoothing. Finite samples of one distribution
already diverge, and more so the smaller they are. Both sides therefore have equally many lines. Compare the value with
the baseline: held-out lines against as many training lines. Unlike in that code, held-out lines are not trained on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from distgan.config import Config
from distgan.data.index.file import INDEX_NAME
from distgan.data.index.loading import load_index
from distgan.data.index.table import Index
from distgan.data.kinds.text import MAX_VOCABULARY
from distgan.data.order import permute
from distgan.data.packing.output_folder import HELD_OUT
from distgan.data.storage import filesystem, locations
from distgan.errors import UserError
from distgan.evaluation.contract import EvaluationContext
from distgan.evaluation.divergences import js_divergence
from distgan.evaluation.numerics.subsets import choose_reals
from distgan.evaluation.real_statistics import MOST_ROWS, RealRows
from distgan.evaluation.samples import read_reals
from distgan.randomness import derive_key

log = logging.getLogger("distgan")

ORDERS = (1, 2, 3, 4)
_BATCH = 1024


def ngram_divergence(lines: Tensor, others: Tensor, order: int) -> Tensor:
    """Return the Jensen-Shannon divergence of the `order`-gram distributions, in bits: 0 equal, 1 disjoint.

    Args:
        lines, others: numbers of characters below `MAX_VOCABULARY`, integers of shapes (n, length) and (m, length),
            neither empty, with length >= order.
    """
    digits = MAX_VOCABULARY ** torch.arange(order, device=lines.device)
    grams = [(side.long().unfold(1, order, 1) * digits).sum(2).flatten() for side in (lines, others)]
    distinct, which = torch.cat(grams).unique(return_inverse=True)
    first, second = (torch.bincount(part, minlength=len(distinct)) for part in which.split([len(g) for g in grams]))
    return js_divergence(first, second) / math.log(2)


def ngram_divergences(lines: Tensor, others: Tensor) -> Tensor:
    """Return `ngram_divergence` for each of `ORDERS` on equally many first lines of both: float64, shape (4,)."""
    count = min(len(lines), len(others))
    return torch.stack([ngram_divergence(lines[:count], others[:count], order) for order in ORDERS])


class NgramDivergence(Metric):
    """Update with generated lines and their numbers; compute `ngram_divergences` to real ones.

    Lines are chosen by number, so the value does not depend on the split into batches and ranks.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    reals: Tensor
    lines: list[Tensor] | Tensor
    numbers: list[Tensor] | Tensor

    def __init__(self, reals: Tensor, most: int, **settings: Any) -> None:
        """Set the real lines.

        Args:
            reals: int32, shape (m, length).
            most: number of generated lines to keep, those with the lowest numbers.
            settings: keyword arguments of `torchmetrics.Metric`.
        """
        super().__init__(**settings)
        self.register_buffer("reals", reals, persistent=False)
        self.most = most
        self.add_state("lines", [], dist_reduce_fx="cat")
        self.add_state("numbers", [], dist_reduce_fx="cat")

    def update(self, lines: Tensor, numbers: Tensor) -> None:
        """Add lines, integers (n, length), with these numbers, int64 of shape (n,)."""
        kept = (numbers < self.most).to(lines.device)
        assert isinstance(self.lines, list)
        assert isinstance(self.numbers, list)
        self.lines.append(lines.detach()[kept].int())
        self.numbers.append(numbers.to(lines.device)[kept])

    def compute(self) -> Tensor:
        """Compute the divergences of the lines of all ranks: float64, shape (4,)."""
        lines, numbers = (torch.cat(s) if isinstance(s, list) else s for s in (self.lines, self.numbers))
        return ngram_divergences(lines[numbers.argsort()].cpu(), self.reals.cpu())


class RealLines(RealRows):
    """Up to `MOST_ROWS` training lines: `rows`, int32, shape (n, length)."""

    def __init__(self, context: EvaluationContext) -> None:
        super().__init__("samples", choose_reals(len(context.index), MOST_ROWS))
        self.cache_name = "real-lines"

    def update(self, lines: Tensor) -> None:
        """Add lines, integers (n, length)."""
        super().update(lines.int())


class NgramJS(NgramDivergence):
    """Divergences of an evaluation from held-out lines, and those of training lines, the `baseline`: `SuiteMetric`."""

    kinds = ("text",)
    takes = ("samples", "numbers")
    main_value = "[4]"
    real_statistic = RealLines

    def __init__(self, context: EvaluationContext, reals: Mapping[str, Tensor]) -> None:
        """Read the held-out lines. Raises UserError if there are none; see `held_out_index`."""
        index, held_out = held_out_index(context.config, context.index), torch.empty(0)
        baseline = torch.zeros(len(ORDERS))
        if context.runtime.is_main:
            held_out = read_lines(context.config, index, min(MOST_ROWS, context.num_samples))
            baseline = ngram_divergences(held_out, shuffled(reals["rows"]))
            log.info("ngram_js: comparing %d generated lines with as many held-out lines", len(held_out))
        super().__init__(held_out, MOST_ROWS)
        self.baseline = baseline

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute `[n]` and `baseline[n]` for n = 1 to 4."""
        named = {"": super().compute(), "baseline": self.baseline}
        return {f"{of}[{n}]": value for of, row in named.items() for n, value in zip(ORDERS, row, strict=True)}


def held_out_index(config: Config, index: Index) -> Index:
    """Return the index of a run's held-out lines, with the characters numbered as in its training lines.

    The lines are in `evaluation.held_out`, or in the folder `held-out` beside the training shards.

    Raises:
        UserError: there are none, or they are part of the training data.
    """
    where = config.evaluation.held_out
    if where is None:
        where = locations.join(index.folder, HELD_OUT)
        if not index.folder or not filesystem.exists(locations.join(where, INDEX_NAME)):
            raise UserError(
                f"evaluation.metrics: ngram_js needs held-out text, found none in "
                f"{locations.public_name(where)}; pack the text with --held-out 0.1, or name a folder in "
                "evaluation.held_out"
            )
    held_out = load_index(where, config.data.cache_dir)
    if held_out.kind != "text":
        raise UserError(f"evaluation.held_out = {where}: holds {held_out.kind}; set it to a folder of text shards")
    if {shard.url for shard in held_out.shards} & {shard.url for shard in index.shards}:
        raise UserError(f"evaluation.held_out = {where}: these are the training shards; set it to other shards")
    assert index.vocabulary is not None
    return held_out.with_vocabulary(index.vocabulary)


def read_lines(config: Config, index: Index, most: int) -> Tensor:
    """Read at most this many lines of an index in random order: int32, shape (n, length).

    Unreadable lines are left out.

    Raises:
        UserError: almost no line can be read.
    """
    chosen = permute(np.arange(min(most, len(index))), len(index), derive_key(0, "ngram_js/held out"))
    # Read in shard order, because remote shards are fetched whole.
    batches = torch.from_numpy(chosen).sort().values.split(_BATCH)
    return shuffled(torch.cat([part.samples for part in read_reals(config.data, index, batches)]).int())


def shuffled(lines: Tensor) -> Tensor:
    """Return the lines in an addressed random order."""
    places = permute(np.arange(len(lines)), len(lines), derive_key(0, "ngram_js/order"))
    return lines[torch.from_numpy(places)]
