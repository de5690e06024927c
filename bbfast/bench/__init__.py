"""The benchmark: a grid of attacks and defenses planned, run, killed, continued, and read as a table."""

from __future__ import annotations

from bbfast.bench.compare import compare
from bbfast.bench.failures import failures
from bbfast.bench.gc import Garbage, find_garbage, remove_garbage
from bbfast.bench.grid import Grid, load_grid
from bbfast.bench.index import Index
from bbfast.bench.kept import kept_grids
from bbfast.bench.outcomes import Outcome
from bbfast.bench.parquet import write_parquet
from bbfast.bench.plan import Cell, Plan, Task, make_plan
from bbfast.bench.pool import LocalPool, Pool
from bbfast.bench.pools import local_pool, make_pool
from bbfast.bench.presets import GRIDS
from bbfast.bench.published import read_published
from bbfast.bench.results import aggregate, grid_rows, pivot, pivot_rows, select, to_csv, to_json
from bbfast.bench.run import Summary, run_plan

__all__ = [
    "GRIDS",
    "Cell",
    "Garbage",
    "Grid",
    "Index",
    "LocalPool",
    "Outcome",
    "Plan",
    "Pool",
    "Summary",
    "Task",
    "aggregate",
    "compare",
    "failures",
    "find_garbage",
    "grid_rows",
    "kept_grids",
    "load_grid",
    "local_pool",
    "make_plan",
    "make_pool",
    "pivot",
    "pivot_rows",
    "read_published",
    "remove_garbage",
    "run_plan",
    "select",
    "to_csv",
    "to_json",
    "write_parquet",
]
