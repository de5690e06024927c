"""The store: keys, one maker per key among processes, damage put aside, nothing torn."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bbfast
from bbfast import _lock, artifact, store
from bbfast._hashing import canonical_json, content_hash, sha256_file, sha256_json
from bbfast.errors import ArtifactError, NewerFormatError, UnknownNameError
from bbfast.store import Content, Store

PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
CONFIG = {"name": "badnets", "ratio": 0.1}
KEY = Store.key("attack", CONFIG, seed=0)


def content(value: float = 1.0) -> Content:
    tensors = {"model": {"weight": torch.full((50,), value)}}
    return Content("attack", {"value": value}, {"c_acc": 0.9, "asr": math.nan}, tensors, {"note": "x"}, ({"epoch": 0},))


def put(place: Store, value: float = 1.0, key: str = KEY, name: str = "badnets") -> Path:
    return place.write("attack", name, key, content(value))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


class TestHashing:
    def test_known_value(self) -> None:
        assert canonical_json({"b": [1, 2.0, None], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.0,null]}'
        assert sha256_json({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"

    @given(value=st.dictionaries(st.text().filter(lambda k: k != "$float"), st.integers() | st.floats() | st.text()))
    def test_order_of_keys_does_not_matter(self, value: dict[str, Any]) -> None:
        assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)

    def test_what_differs_hashes_differently(self) -> None:
        values = [{"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": True}, {"a": None}, {"a": [1]}, {"b": 1}, {"a": math.nan}]
        assert len({sha256_json(value) for value in values}) == len(values)

    def test_file(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"abc")
        assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

    def test_content_ignores_strides_and_order(self) -> None:
        x = torch.arange(12).reshape(3, 4)
        assert content_hash({"a": x, "b": x[0]}) == content_hash({"b": x[0].clone(), "a": x.t().contiguous().t()})

    @pytest.mark.parametrize(
        "other",
        [
            {"a": torch.arange(4)},
            {"b": torch.arange(6)},
            {"a": torch.arange(6).reshape(2, 3)},
            {"a": torch.arange(6).int()},
            {"a": torch.arange(6), "b": torch.zeros(0)},
            {"a": torch.tensor([0, 1, 2, 3, 5, 4])},
            {},
        ],
    )
    def test_content_sees_names_dtypes_shapes_and_values(self, other: dict[str, torch.Tensor]) -> None:
        assert content_hash({"a": torch.arange(6)}) != content_hash(other)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex64, torch.uint8])
    def test_content_of_any_dtype(self, dtype: torch.dtype) -> None:
        assert len(content_hash({"scalar": torch.ones((), dtype=dtype), "empty": torch.ones(0, 2, dtype=dtype)})) == 64


class TestKey:
    def test_depends_on_everything_that_matters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = {
            KEY,
            Store.key("defense", CONFIG, seed=0),
            Store.key("attack", {**CONFIG, "ratio": 0.2}, seed=0),
            Store.key("attack", CONFIG, seed=1),
            Store.key("attack", CONFIG),
            Store.key("attack", CONFIG, seed=0, version=2),
        }
        monkeypatch.setattr(store, "PROTOCOL_VERSION", store.PROTOCOL_VERSION + 1)
        keys.add(Store.key("attack", CONFIG, seed=0))
        assert len(keys) == 7

    def test_is_the_same_tomorrow(self) -> None:
        # Written down: a change of this value orphans every store there is, and needs a new PROTOCOL_VERSION.
        assert Store.key("attack", {"name": "badnets"}, seed=0) == (
            "20eba7c061e1d7d8c240298b141f60c618c89fc8f18db353467ea86044ee3b92"
        )

    def test_same_for_another_order(self) -> None:
        assert Store.key("attack", {"ratio": 0.1, "name": "badnets"}, seed=0) == KEY

    @pytest.mark.parametrize("stage", ["", "Attack", "at/tack", "attack-x"])
    def test_stage_must_be_a_name(self, stage: str) -> None:
        with pytest.raises(ValueError, match="stage must match"):
            Store.key(stage, {})

    @pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "a b"])
    def test_name_must_be_a_name(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match="name must match"):
            Store(tmp_path).path("attack", name, KEY)

    @pytest.mark.parametrize("key", ["", KEY[:12], KEY.upper(), "../" + KEY[3:]])
    def test_key_must_be_a_key(self, tmp_path: Path, key: str) -> None:
        for use in (lambda: Store(tmp_path).path("attack", "x", key), lambda: Store(tmp_path).work(key)):
            with pytest.raises(ValueError, match="key must match"):
                use()


class TestReadAndWrite:
    def test_round_trip(self, tmp_path: Path) -> None:
        place = bbfast.Store(tmp_path / "runs")
        assert not (tmp_path / "runs").exists() and place.read("attack", "badnets", KEY) is None
        assert not place.has("attack", "badnets", KEY) and list(place.list()) == []
        folder = put(place)
        assert folder == tmp_path / "runs" / f"attack-badnets-{KEY[:12]}" == place.path("attack", "badnets", KEY)
        assert place.has("attack", "badnets", KEY)
        read = place.read("attack", "badnets", KEY, kind="attack")
        assert read is not None and read.config == {"value": 1.0} and read.extra == {"note": "x"}
        assert read.log == [{"epoch": 0}] and torch.equal(read.tensors("model")["weight"], torch.ones(50))

    def test_written_once(self, tmp_path: Path) -> None:
        put(Store(tmp_path))
        with pytest.raises(ArtifactError, match="there already"):
            put(Store(tmp_path), 2.0)

    def test_root_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("x")
        with pytest.raises(ArtifactError, match="is a file"):
            Store(tmp_path / "a")

    def test_anything_with_save_can_be_written(self, tmp_path: Path) -> None:
        class Result:
            def save(self, folder: Path) -> Path:
                return artifact.write(folder, "other", config={"a": 1})

        folder = Store(tmp_path).write("attack", "x", KEY, Result())
        assert artifact.read(folder).kind == "other"

    def test_work_folder_lives_until_the_artefact_is_written(self, tmp_path: Path) -> None:
        place = Store(tmp_path)
        work = place.work(KEY)
        (work / "checkpoint").write_text("x")
        assert place.work(KEY) == work and (work / "checkpoint").exists()
        other = place.work(Store.key("attack", {}))
        put(place)
        assert not work.exists() and other.is_dir()

    def test_temporary_folders_of_dead_processes_are_swept(self, tmp_path: Path) -> None:
        from bbfast import _atomic

        old = tmp_path / f"{_atomic.TEMP_PREFIX}{_atomic._host()}-{2**22 + 1}-abc"
        old.mkdir()
        os.utime(old, (time.time() - 7200,) * 2)
        young = tmp_path / f"{_atomic.TEMP_PREFIX}{_atomic._host()}-{2**22 + 1}-def"
        young.mkdir()
        put(Store(tmp_path))
        assert not old.exists() and young.is_dir()
        assert list(Store(tmp_path).sweep(min_age=-1)) == [young]


class TestDamage:
    @pytest.mark.parametrize("name", ["manifest.json", "config.json", "metrics.json", "log.jsonl", "model.safetensors"])
    @pytest.mark.parametrize("how", ["bit", "missing"])
    def test_put_aside_reported_and_remade(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
    ) -> None:
        place = Store(tmp_path)
        damaged = put(place) / name
        if how == "bit":
            damage(damaged)
        else:
            damaged.unlink()
        with caplog.at_level(logging.WARNING, "bbfast.store"):
            assert place.read("attack", "badnets", KEY) is None
        assert name in caplog.text and ".quarantine" in caplog.text
        assert not place.has("attack", "badnets", KEY) and list(place.list()) == []
        aside = list((tmp_path / ".quarantine").iterdir())
        assert len(aside) == 1 and aside[0].name.startswith(f"attack-badnets-{KEY[:12]}.")
        put(place, 2.0)
        read = place.read("attack", "badnets", KEY)
        assert read is not None and read.config == {"value": 2.0}

    def test_get_or_make_remakes(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        place = Store(tmp_path)
        place.get_or_make("attack", "badnets", CONFIG, lambda work: content(1.0), seed=0)
        damage(place.path("attack", "badnets", KEY) / "model.safetensors")
        with caplog.at_level(logging.WARNING, "bbfast.store"):
            made = place.get_or_make("attack", "badnets", CONFIG, lambda work: content(2.0), seed=0)
        assert made.config == {"value": 2.0} and len(caplog.records) == 1

    @pytest.mark.parametrize("moment", ["after reading", "before moving"])
    def test_one_replaced_meanwhile_is_left_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        place = Store(tmp_path)
        folder = put(place)
        damage(folder / "config.json")
        read, rename, moves = artifact.read, os.rename, []

        def replace() -> None:
            if not moves:
                artifact.write(folder, "attack", config={"good": 1}, overwrite=True)

        def slow_read(*args: Any, **options: Any) -> Any:
            try:
                return read(*args, **options)
            finally:
                if moment == "after reading":
                    replace()

        def slow_rename(source: Path, target: Path) -> None:
            if source == folder and moment == "before moving":
                replace()
            moves.append(target)
            rename(source, target)

        monkeypatch.setattr(artifact, "read", slow_read)
        monkeypatch.setattr(os, "rename", slow_rename)
        assert place.read("attack", "badnets", KEY) is None
        assert len(moves) == (0 if moment == "after reading" else 2)
        monkeypatch.undo()
        found = place.read("attack", "badnets", KEY)
        assert found is not None and found.config == {"good": 1}
        assert not list((tmp_path / ".quarantine").iterdir())

    def test_newer_format_is_an_error_and_is_kept(self, tmp_path: Path) -> None:
        place = Store(tmp_path)
        folder = put(place)
        manifest = json.loads((folder / "manifest.json").read_text()) | {"format_version": 99}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(NewerFormatError, match="update bbfast"):
            place.read("attack", "badnets", KEY)
        assert folder.is_dir() and not (tmp_path / ".quarantine").exists()

    def test_empty_folder_counts_as_absent_and_other_files_do_not(self, tmp_path: Path) -> None:
        place = Store(tmp_path)
        folder = place.path("attack", "badnets", KEY)
        folder.mkdir()
        assert place.read("attack", "badnets", KEY) is None
        (folder / "thesis.tex").write_text("x")
        with pytest.raises(ArtifactError, match="is no bbfast result"):
            place.read("attack", "badnets", KEY)


class TestFindAndList:
    def test_list(self, tmp_path: Path) -> None:
        place = Store(tmp_path)
        keys = [Store.key("attack", {"i": i}) for i in range(3)]
        put(place, key=keys[0])
        put(place, key=keys[1], name="input_aware")
        place.write("defense", "nc-fast", keys[2], content())
        (tmp_path / "notes").mkdir()
        (tmp_path / f"attack-empty-{KEY[:12]}").mkdir()
        assert [(e.stage, e.name) for e in place.list()] == [
            ("attack", "badnets"),
            ("attack", "input_aware"),
            ("defense", "nc-fast"),
        ]
        assert [e.short_key for e in place.list("attack", "badnets")] == [keys[0][:12]]
        assert [e.name for e in place.list(stage="defense")] == ["nc-fast"]
        assert [e.path for e in place.list(name="input_aware")] == [place.path("attack", "input_aware", keys[1])]

    def test_find(self, tmp_path: Path) -> None:
        place = Store(tmp_path)
        folder = put(place)
        other = put(place, name="blended", key=Store.key("attack", {}))
        for text in (
            folder,
            str(folder),
            folder.name,
            KEY,
            KEY[:12],
            KEY[:6],
            "attack-badnets",
            f"elsewhere/{folder.name}",
        ):
            assert place.find(text) == folder
        assert place.find("attack-bl") == other

    def test_find_a_folder_outside_the_store(self, tmp_path: Path) -> None:
        folder = artifact.write(tmp_path / "elsewhere", "k", config={})
        assert Store(tmp_path / "runs").find(folder) == folder

    def test_find_several_or_none(self, tmp_path: Path) -> None:
        place = Store(tmp_path)
        put(place)
        put(place, key=Store.key("attack", {}))
        with pytest.raises(ArtifactError, match=r"'attack-badnets' fits several results.*write more of it"):
            place.find("attack-badnets")
        with pytest.raises(
            UnknownNameError, match=rf"attack-badnetz-{KEY[:12]}.*did you mean 'attack-badnets-{KEY[:12]}'"
        ):
            place.find(f"attack-badnetz-{KEY[:12]}")
        with pytest.raises(UnknownNameError):
            Store(tmp_path / "nowhere").find("x")


class TestLock:
    def test_excludes_threads_and_calls_back(self, tmp_path: Path) -> None:
        place, order, waits = Store(tmp_path), [], []
        inside = threading.Event()

        def first() -> None:
            with place.lock(KEY):
                inside.set()
                time.sleep(0.2)
                order.append("first")

        thread = threading.Thread(target=first)
        thread.start()
        assert inside.wait(10)
        with place.lock(KEY, on_wait=waits.append):
            order.append("second")
        thread.join()
        assert order == ["first", "second"] and waits == sorted(waits) and waits
        assert list((tmp_path / ".locks").iterdir()) == []

    def test_other_keys_are_free(self, tmp_path: Path) -> None:
        place = Store(tmp_path)
        with place.lock(KEY), place.lock(Store.key("attack", {}), timeout=0):
            pass

    def test_timeout_names_the_holder(self, tmp_path: Path) -> None:
        place = Store(tmp_path)
        with place.lock(KEY):
            message = rf"result {KEY[:12]} is being made by process {os.getpid()} on .*{KEY}.*wait for it or stop it"
            with pytest.raises(ArtifactError, match=message), place.lock(KEY, timeout=0.05):
                pass
        with place.lock(KEY, timeout=0):
            pass

    def test_freed_by_an_exception(self, tmp_path: Path) -> None:
        place = Store(tmp_path)
        with pytest.raises(KeyboardInterrupt), place.lock(KEY):
            raise KeyboardInterrupt
        with place.lock(KEY, timeout=0):
            pass

    def test_lock_file_removed_between_opening_and_locking(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever leaves removes the file: a lock on the removed one must not pass for the lock."""
        place, held = Store(tmp_path), contextlib.ExitStack()
        held.enter_context(place.lock(KEY))
        real = _lock._try

        def late(descriptor: int, path: Path) -> bool:
            monkeypatch.setattr(_lock, "_try", real)
            held.close()
            held.enter_context(place.lock(KEY, timeout=0))
            return real(descriptor, path)

        monkeypatch.setattr(_lock, "_try", late)
        with held, pytest.raises(ArtifactError, match="is being made by"), place.lock(KEY, timeout=0):
            pass

    def test_many_threads_one_at_a_time(self, tmp_path: Path) -> None:
        """Each holder removes the lock file when it leaves; none may slip in beside another on a removed file."""
        place, inside, worst = Store(tmp_path), [], []

        def work() -> None:
            for _ in range(25):
                with place.lock(KEY):
                    inside.append(1)
                    worst.append(len(inside))
                    time.sleep(0)
                    inside.pop()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(worst) == 100 and max(worst) == 1


class TestGetOrMake:
    def test_made_once(self, tmp_path: Path) -> None:
        place, calls = Store(tmp_path), []

        def make(work: Path) -> Content:
            calls.append(work)
            assert work.is_dir()
            return content()

        for _ in range(2):
            made = place.get_or_make("attack", "badnets", CONFIG, make, seed=0, kind="attack")
            assert made.config == {"value": 1.0}
        assert len(calls) == 1 and not calls[0].exists()
        place.get_or_make("attack", "badnets", CONFIG, make, seed=1)
        place.get_or_make("attack", "badnets", CONFIG, make, seed=0, version=2)
        assert len(calls) == 3 and len(place.list()) == 3

    def test_failed_work_is_gone_on_with(self, tmp_path: Path) -> None:
        place = Store(tmp_path)

        def make(work: Path) -> Content:
            step = work / "step"
            if not step.exists():
                step.write_text("1")
                raise RuntimeError("killed")
            return content(float(step.read_text()))

        with pytest.raises(RuntimeError, match="killed"):
            place.get_or_make("attack", "badnets", CONFIG, make)
        assert list(place.list()) == []
        assert place.get_or_make("attack", "badnets", CONFIG, make, timeout=0).config == {"value": 1.0}


RACER = """
import json, os, sys, time, torch
from pathlib import Path
from bbfast.store import Content, Store
torch.set_num_threads(1)
def make(work):
    with open(folder / "made", "a") as log:
        log.write(f"{os.getpid()}\\n")
    time.sleep(0.3)
    pid = float(os.getpid())
    return Content("attack", {"pid": pid}, {}, {t: {"x": torch.full((10_000,), pid)} for t in "ab"})
print("ready", flush=True)
for line in sys.stdin:
    number, folder, waits = int(line.split()[0]), Path(line.split()[1]), []
    made = Store(folder / "runs").get_or_make("attack", "race", {"round": number}, make, on_wait=waits.append)
    values = {made.config["pid"]} | {v for t in "ab" for v in made.tensors(t)["x"].unique().tolist()}
    print(json.dumps({"values": sorted(values), "waited": bool(waits)}), flush=True)
"""


@pytest.fixture(scope="module")
def racers() -> Iterator[list[subprocess.Popen[str]]]:
    processes = [subprocess.Popen([sys.executable, "-c", RACER], **PIPES) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str], folder: Path, number: int) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{number} {folder}\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def test_two_processes_make_one_artefact(tmp_path: Path, racers: list[subprocess.Popen[str]]) -> None:
    waited = []
    for number in range(4):
        for process in racers[:2]:
            tell(process, tmp_path, number)
        answers = [hear(process) for process in racers[:2]]
        assert answers[0]["values"] == answers[1]["values"] and len(answers[0]["values"]) == 1
        waited += [answer["waited"] for answer in answers]
    assert any(waited) and not all(waited)
    assert len((tmp_path / "made").read_text().split()) == 4
    assert not list((tmp_path / "runs").glob(".bbfast-tmp-*")) and len(Store(tmp_path / "runs").list()) == 4


def test_the_waiting_process_takes_over_when_the_maker_is_killed(
    tmp_path: Path, racers: list[subprocess.Popen[str]]
) -> None:
    waiting, maker = racers[1:]
    tell(maker, tmp_path, 0)
    while not (tmp_path / "made").exists() or not (tmp_path / "made").read_text():
        time.sleep(0.005)
    tell(waiting, tmp_path, 0)
    maker.send_signal(signal.SIGKILL)
    assert maker.wait() == -signal.SIGKILL
    assert hear(waiting)["values"] == [float(waiting.pid)]
    assert (tmp_path / "made").read_text().split() == [str(maker.pid), str(waiting.pid)]


def test_full_disk_and_then_space_again(small_disk: Path) -> None:
    place = Store(small_disk)
    put(place, name="kept")
    filler = small_disk / "filler"
    filler.write_bytes(bytes((os.statvfs(small_disk).f_bavail - 1) * os.statvfs(small_disk).f_bsize))
    with pytest.raises(ArtifactError, match="No space left on device; free some space"):
        place.get_or_make("attack", "badnets", CONFIG, lambda work: content(), seed=0)
    assert [entry.name for entry in place.list()] == ["kept"] and place.read("attack", "kept", KEY) is not None
    filler.unlink()
    assert place.get_or_make("attack", "badnets", CONFIG, lambda work: content(), seed=0).config == {"value": 1.0}


def test_read_only_store(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = Store(small_disk)
    put(place)
    other = Store.key("attack", {"other": 1})
    damage(put(place, key=other) / "config.json")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert place.get_or_make("attack", "badnets", CONFIG, lambda work: content(9.0), seed=0).config == {"value": 1.0}
    with caplog.at_level(logging.WARNING, "bbfast.store"):
        assert place.read("attack", "badnets", other) is None
    assert "stays where it is (Read-only file system)" in caplog.text
    for use in (
        lambda: place.get_or_make("attack", "new", CONFIG, lambda work: content()),
        lambda: put(place, name="new"),
        lambda: place.work(KEY),
    ):
        with pytest.raises(ArtifactError, match=f"{small_disk}.*Read-only file system; choose a"):
            use()
