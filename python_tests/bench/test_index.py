"""The table of a store when its file is damaged, or folders go while it is made."""

from __future__ import annotations

import logging
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import bench_workers
import pytest

from bbfast.bench import Index, Plan, grid_rows, run_plan
from bbfast.bench import index as module
from bbfast.store import Store

MakePlan = Callable[..., Plan]


@pytest.mark.parametrize("read", ["refresh", "rows"])
def test_a_file_damaged_in_the_middle_is_made_anew(
    plan: MakePlan, tmp_path: Path, caplog: pytest.LogCaptureFixture, read: str
) -> None:
    made, store = plan(seeds=[0, 1, 2, 3]), Store(tmp_path)
    run_plan(made, store, bench_workers.Inline(tmp_path), progress=False)
    with Index(store) as index:
        index.refresh()
        whole = index.rows()
    db = sqlite3.connect(tmp_path / "index.sqlite")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    path = tmp_path / "index.sqlite"
    content = path.read_bytes()
    assert len(content) > 4 * 4096
    # Its first page says that all is well.
    path.write_bytes(content[:4096] + random.Random(0).randbytes(len(content) - 4096))
    with caplog.at_level(logging.WARNING), Index(store) as index:
        if read == "refresh":
            assert index.refresh() == {}
        assert index.rows() == whole
    assert [record.message.count("made anew from the folders") for record in caplog.records] == [1]
    assert run_plan(made, store, bench_workers.Inline(tmp_path), progress=False).begun == 0
    assert {row["status"] for row in grid_rows(made, store)} == {"done"}


def test_a_folder_that_goes_while_it_is_looked_at(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another runner has put it aside: it is missing, and the run makes it anew."""
    made, store = plan(attacks=["badnets"]), Store(tmp_path)
    run_plan(made, store, bench_workers.Inline(tmp_path), progress=False)
    real = module._row

    def late(folder: Path) -> object:
        if folder.name.startswith("defense-nc"):
            shutil.rmtree(folder)
        return real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_row", late)
        rows = grid_rows(made, store)
    assert [row["status"] for row in rows] == ["done", "done", "missing"]
    assert run_plan(made, store, bench_workers.Inline(tmp_path), progress=False).begun == 1
