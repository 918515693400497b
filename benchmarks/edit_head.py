"""Provable Grad-CAM edits of a ResNet-sized head, at the size of ProGrad's largest experiment, and what peers take.

200 classes with 5 images each: the normalised 7 x 7 map of every image must lie within eps of a target map. Features
are synthetic (seeded, non-negative, half of them zero), weights random. Timed: the whole of `soundly.edit`, that is
evaluating the frozen part, building rows, solving, rounding to float32 and having the checker prove every row.

In the same run, on a few of the same blocks: HiGHS on one linear program per block (what a user would write with an
open solver), and the plain program with bounds |d| <= t on several blocks at once.

    python benchmarks/edit_head.py [--classes 200] [--images 5] [--json]

Reference: Tao and Thakur, NeurIPS 2025, table 1: 3 h 37 min to 3 h 51 min with Gurobi for 1000 images, eps 5e-2.
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import highspy
import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import soundly
from soundly.editing.constraints import Constraint
from soundly.editing.program import Block, Program, compile_program
from soundly.editing.trunk import GraphTrunk
from soundly.explanation.attribution import minmax

OUTPUTS, FEATURES, SIDE = 1000, 2048, 7


class Head(nn.Module):
    """What follows the last feature map of a ResNet: global average pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ReLU()
        self.fc = nn.Linear(FEATURES, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def problem(classes: int, images: int, eps: float, seed: int) -> tuple[Head, list[Constraint]]:
    """A head, and for each class maps that must come close to those of cleaner features."""
    torch.manual_seed(seed)
    head = Head()
    constraints: list[Constraint] = []
    for c in range(classes):
        for i in range(images):
            clean = torch.randn(1, FEATURES, SIDE, SIDE)
            noisy = (clean + 0.5 * torch.randn_like(clean)).relu()
            target = torch.einsum("k,kij->ij", head.fc.weight[c].detach(), clean.relu()[0])
            point = soundly.at(noisy, name=f"image {i} of class {c}")
            constraints.append(point.gradcam(of=c, layer="features").normalised_near(minmax(target), eps=eps))
    return head, constraints


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--eps", type=float, default=5e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer-blocks", type=int, default=2, help="blocks given to the peers")
    parser.add_argument("--peer-limit", type=float, default=60.0, help="seconds for each peer run")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)

    head, constraints = problem(args.classes, args.images, args.eps, args.seed)
    network = soundly.load(head, constraints[0].expression.terms[0].functional.point.x)  # type: ignore[union-attr]
    wall, cpu = time.perf_counter(), time.process_time()
    edit = soundly.edit(network, constraints, layer="fc")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    parts = ", ".join(f"{name} {s:.1f} s" for name, s in edit.seconds.items())
    print(f"soundly (l2)         {edit.status}: {edit.proven} of {edit.rows} rows, before {edit.rows_before}")
    print(f"                     {wall:.1f} s ({parts})")
    result: dict[str, Any] = {
        "classes": args.classes, "images": args.classes * args.images, "eps": args.eps, "status": edit.status,
        "rows": edit.rows, "rows_before": edit.rows_before, "proven_rows": edit.proven,
        "seconds": wall, "cpu_seconds": cpu,
        **{f"{name}_seconds": s for name, s in edit.seconds.items()}, "threads": torch.get_num_threads(),
    }  # fmt: skip

    few = args.peer_blocks * args.images
    program = compile_program(GraphTrunk(network, "fc"), constraints[:few])
    blocks = list(program.blocks())
    started = time.perf_counter()
    mine = soundly.edit(network, constraints[:few], layer="fc").seconds["solve"] / len(blocks)
    print(f"soundly, {len(blocks)} blocks    {mine:.2f} s a block")
    started = time.perf_counter()
    solved = [highs_block(program, block, args.peer_limit) for block in blocks]
    split = (time.perf_counter() - started) / len(blocks)
    ended = "solved" if all(solved) else "not solved in time (a lower bound)"
    print(f"HiGHS per block (l1) {split:.2f} s a block, {ended}; {split / mine:.1f} times soundly's")
    started = time.perf_counter()
    plain_solved = highs_plain(program, blocks, args.peer_limit)
    plain = (time.perf_counter() - started) / len(blocks)
    ended = "solved" if plain_solved else "not solved in time (a lower bound)"
    print(f"plain unsplit LP     {plain:.2f} s a block, {ended}; {plain / mine:.1f} times soundly's")
    result |= {
        "block_seconds": mine,
        "highs_block_seconds": split, "highs_block_solved": all(solved), "highs_block_ratio": split / mine,
        "plain_block_seconds": plain, "plain_solved": plain_solved, "plain_ratio": plain / mine,
    }  # fmt: skip
    if args.json:
        print(json.dumps(result))


def highs_block(program: Program, block: Block, limit: float) -> bool:
    """min |d|_1 for one block, all rows at once, d = p - q with p, q >= 0. Whether it was solved in time."""
    lower, upper = _bounds(program, block)
    matrix = block.matrix.numpy()
    n = matrix.shape[1]
    return _highs(np.hstack([matrix, -matrix]), lower, upper, np.ones(2 * n), np.zeros(2 * n), limit)


def highs_plain(program: Program, blocks: Sequence[Block], limit: float) -> bool:
    """min sum t with -t <= d <= t for several blocks in one program. Whether it was solved in time."""
    bounds = [_bounds(program, block) for block in blocks]
    rows = sp.block_diag([block.matrix.numpy() for block in blocks])
    n = rows.shape[1]
    eye = sp.identity(n)
    matrix = sp.bmat([[rows, None], [eye, -eye], [eye, eye]])
    lower = np.concatenate([*(b[0] for b in bounds), np.full(n, -np.inf), np.zeros(n)])
    upper = np.concatenate([*(b[1] for b in bounds), np.zeros(n), np.full(n, np.inf)])
    free = np.concatenate([np.full(n, -np.inf), np.zeros(n)])
    return _highs(matrix, lower, upper, np.concatenate([np.zeros(n), np.ones(n)]), free, limit)


def _bounds(program: Program, block: Block) -> tuple[NDArray[Any], NDArray[Any]]:
    weights = program.weights[list(block.classes)].reshape(-1)
    now = block.matrix @ weights + block.frozen
    return (program.lower[block.rows] - now).numpy(), (program.upper[block.rows] - now).numpy()


def _highs(
    matrix: Any, lower: NDArray[Any], upper: NDArray[Any], cost: NDArray[Any], least: NDArray[Any], limit: float
) -> bool:
    sparse = sp.csr_matrix(matrix)
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("time_limit", limit)
    solver.setOptionValue("threads", torch.get_num_threads())
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = sparse.shape[1], sparse.shape[0]
    model.col_cost_, model.col_lower_, model.col_upper_ = cost, least, np.full(len(cost), np.inf)
    model.row_lower_, model.row_upper_ = lower, upper
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_, model.a_matrix_.index_, model.a_matrix_.value_ = sparse.indptr, sparse.indices, sparse.data
    solver.passModel(model)
    solver.run()
    return bool(solver.getModelStatus() == highspy.HighsModelStatus.kOptimal)


if __name__ == "__main__":
    main()
