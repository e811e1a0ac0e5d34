"""Real rules on pieces of their tensors, as staging launches them: the bits of one update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bnbx.kernels import reference
from bnbx.kernels.batch import Batch
from bnbx.kernels.packing import bytes_of
from bnbx.kernels.plan import Plan
from bnbx.kernels.staging import Part, Piece, Stager, cut, pack
from plans import Case, assert_equal_bits, cases, copy, make_batch, mixed_cases

SIZES = (1, 4097, 255, 10_000)
PIECE_BYTES = 4096
CASES = [made for made in (*cases(), *mixed_cases()) if made.plan.storages]
ELEMENTWISE = [made for made in CASES if not made.plan.measured]


def entries(plan: Plan) -> list[int]:
    """How many entries of each state tensor belong to a chunk."""
    found = []
    for storage in plan.storages:
        if storage.quant_type is None:
            found.append(plan.chunk)
        else:
            found += [bytes_of(storage.quant_type, plan.chunk)]
            found += [plan.chunk // storage.block_size]
    return found


def parts_of(batch: Batch) -> list[Part]:
    """The states of a batch in parts; those of rows that are measured first, whole."""
    plan, found = batch.plan, []
    for index, (p, _, *states, _) in enumerate(batch.tensors):
        if plan.measured:
            sizes = [t.numel() for t in states]
            found += cut(index, p.numel(), states, sizes, p.numel(), PIECE_BYTES)
        else:
            found += cut(index, p.numel(), states, entries(plan), plan.chunk, PIECE_BYTES)
    return found


@pytest.mark.parametrize("made", CASES, ids=[made.name for made in CASES])
def test_an_update_in_pieces_has_the_bits_of_one_update(made: Case) -> None:
    whole = make_batch(made, SIZES)
    staged = copy(whole)

    def launch(piece: Piece, states: Sequence[tuple[Tensor, ...]]) -> None:
        rows = []
        for part, tensors in zip(piece.parts, states, strict=True):
            p, g, *_, scale = staged.tensors[part.owner]
            at = slice(part.start, part.stop)
            rows.append((p[at], g[at], *tensors, scale))
        reference.run([replace(staged, tensors=rows)])

    work = pack(parts_of(staged), PIECE_BYTES)
    assert len(work) > 2
    Stager(torch.device("cpu"), piece_bytes=PIECE_BYTES).run(work, launch)
    before = copy(whole)
    reference.run([whole])
    assert_equal_bits(staged, whole)
    assert not torch.equal(whole.tensors[1][0], before.tensors[1][0])


def test_most_rules_are_run_in_pieces() -> None:
    assert len(ELEMENTWISE) > 10
