"""What the benchmark's machinery costs: planning the published grid, stages that do nothing, queries of many records.

python benchmarks/grid.py
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bbfast import artifact
from bbfast.bench import Index, LocalPool, load_grid, make_plan, pivot, run_plan
from bbfast.bench.index import COLUMNS
from bbfast.bench.outcomes import Outcome
from bbfast.bench.work import Memory
from bbfast.store import Store


def nothing(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
    return Outcome("done", folder="-")


def planning() -> None:
    started = time.perf_counter()
    plan = make_plan(load_grid("paper"))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"paper: {len(plan.cells)} cells, {len(plan.tasks)} stages planned in {seconds:.1f} s, peak {peak:.2f} GiB")


def running(cells: int, workers: int) -> None:
    grid = {
        "datasets": ["digits"],
        "models": ["small_cnn"],
        "attacks": ["badnets"],
        "defenses": ["none", "ft", "fp", "nc", "clp"],
        "seeds": list(range(cells // 5)),
    }
    plan = make_plan(load_grid(grid))
    folder = Path(tempfile.mkdtemp())
    try:
        pool = LocalPool(folder, workers, threads=1, work=nothing)
        started = time.perf_counter()
        done = run_plan(plan, Store(folder), pool, progress=False)
        seconds = time.perf_counter() - started
    finally:
        shutil.rmtree(folder)
    print(f"{done.done} empty stages, {workers} workers: {seconds:.1f} s, {1000 * seconds / done.done:.2f} ms each")


def querying(records: int) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        with Index(Store(folder)) as index:
            rows = []
            for i in range(records):
                values = dict.fromkeys(COLUMNS)
                values |= {"folder": f"r{i}", "stage": "defense", "dataset": f"d{i % 4}", "model": f"m{i // 4 % 4}"}
                values |= {"attack": f"a{i // 16 % 24}", "defense": f"f{i // 384 % 40}", "ratio": 0.1, "seed": i}
                values |= {"c_acc": (i % 97) / 97, "asr": (i % 89) / 89}
                rows.append(("", *(values[column] for column in COLUMNS)))
            marks = ", ".join("?" * len(rows[0]))
            with index._db:
                index._db.executemany(f"INSERT INTO records VALUES ({marks})", rows)
            started = time.perf_counter()
            found = index.rows({"dataset": "d1", "model": "m2"})
            table = pivot(found, "asr")
            seconds = time.perf_counter() - started
            started = time.perf_counter()
            every = index.rows()
            whole = time.perf_counter() - started
    finally:
        shutil.rmtree(folder)
    print(
        f"{records} records: {len(found)} filtered and made a {len(table[0])} x {len(table[1])} matrix in "
        f"{seconds:.3f} s; all {len(every)} read in {whole:.2f} s"
    )


def reading(folders: int) -> None:
    """A store of real folders: the table made from them, and asked again when nothing has changed."""
    root = Path(tempfile.mkdtemp())
    try:
        attack = {
            "data": {"name": "digits"},
            "model": {"name": "small_cnn"},
            "attack": "badnets",
            "attack_config": {"ratio": 0.1},
        }
        config = {"attack": attack, "defense": "nc", "seed": 0}
        first = root / "defense-nc-000000000000"
        artifact.write(first, "defense", config=config, metrics={"c_acc": 0.9, "asr": 0.1})
        for i in range(1, folders):
            folder = root / f"defense-nc-{i:012x}"
            folder.mkdir()
            for path in first.iterdir():
                os.link(path, folder / path.name)
        times = []
        for _ in range(2):
            started = time.perf_counter()
            with Index(Store(root)) as index:
                index.refresh()
                found = index.rows({"dataset": "digits", "attack": "badnets"})
            times.append(time.perf_counter() - started)
    finally:
        shutil.rmtree(root)
    print(f"{len(found)} folders of results: table made from them in {times[0]:.2f} s, asked again in {times[1]:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--folders", type=int, default=50_000, help="a hard link's limit is 65,000")
    given = parser.parse_args()
    planning()
    running(given.cells, given.workers)
    querying(given.records)
    reading(given.folders)


if __name__ == "__main__":
    main()
