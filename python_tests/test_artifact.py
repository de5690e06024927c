"""Artefacts: everything comes back, damage is found and named, and an interrupted write leaves nothing to load."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bbfast import _atomic, artifact
from bbfast._artifact_read import manifest_checksum
from bbfast._hashing import from_json, to_json
from bbfast._version import __version__, commit
from bbfast.errors import ArtifactError, CorruptArtifactError, NewerFormatError

PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text().filter(lambda k: k != "$float"), inner, max_size=4)
    ),
    max_leaves=12,
)


def write_sample(folder: Path, **changes: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    content: dict[str, Any] = {
        "config": {"name": "badnets", "ratio": 0.1, "seed": 0, "layers": (1, 2), "note": None},
        "metrics": {"c_acc": 0.9, "asr": math.nan, "anomaly": [math.inf, 1.5]},
        "tensors": {
            "model": {"weight": torch.randn(4, 3, generator=generator), "steps": torch.tensor(7)},
            "images": {"images": torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=generator)},
        },
        "extra": {"limit": math.nan},
        "log": [{"epoch": 0, "loss": 1.5}, {"epoch": 1, "loss": math.nan}],
    }
    return artifact.write(folder, "attack", **{**content, **changes})


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def same(a: Any, b: Any) -> bool:
    """Equality in which NaN equals NaN, and 1, 1.0 and True differ."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


class TestRoundTrip:
    def test_every_part_comes_back(self, tmp_path: Path) -> None:
        folder = write_sample(tmp_path / "deep" / "result")
        read = artifact.read(folder, "attack")
        assert read.kind == "attack" and read.folder == folder
        assert read.config == {"name": "badnets", "ratio": 0.1, "seed": 0, "layers": [1, 2], "note": None}
        assert same(read.metrics, {"c_acc": 0.9, "asr": math.nan, "anomaly": [math.inf, 1.5]})
        assert same(read.extra, {"limit": math.nan})
        assert same(read.log, [{"epoch": 0, "loss": 1.5}, {"epoch": 1, "loss": math.nan}])
        assert read.stems == ["images", "model"]
        generator = torch.Generator().manual_seed(0)
        assert torch.equal(read.tensors("model")["weight"], torch.randn(4, 3, generator=generator))
        assert read.tensors("model")["steps"].shape == ()

    def test_only_what_is_given_is_written(self, tmp_path: Path) -> None:
        folder = artifact.write(tmp_path / "a", "defense", config={})
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "manifest.json", "metrics.json"]
        read = artifact.read(folder)
        assert (read.config, read.metrics, read.extra, read.log, read.stems) == ({}, {}, {}, [], [])

    def test_manifest_names_versions_sizes_and_checksums(self, tmp_path: Path) -> None:
        folder = write_sample(tmp_path / "a", meta={"key": "abc"})
        manifest = artifact.read_manifest(folder)
        assert manifest["format_version"] == artifact.FORMAT_VERSION == 1
        assert manifest["torch"] == torch.__version__ and manifest["meta"] == {"key": "abc"}
        assert manifest["bbfast"] == __version__ and manifest["commit"] == commit()
        others = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != "manifest.json"}
        assert {name: entry["size"] for name, entry in manifest["files"].items()} == others
        assert all(len(entry["sha256"]) == 64 for entry in manifest["files"].values())

    def test_files_are_strict_json(self, tmp_path: Path) -> None:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        folder = write_sample(tmp_path / "a")
        for path in folder.glob("*.json"):
            json.loads(path.read_text(), parse_constant=refuse)
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["asr"] is None and metrics["anomaly"][0] == {"$float": "inf"}

    @pytest.mark.parametrize(
        "dtype",
        [
            *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
            *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.complex64),
        ],
    )
    @pytest.mark.parametrize("shape", [(), (0,), (0, 3), (5,), (2, 3, 4)])
    def test_dtypes_and_shapes(self, tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
        folder = artifact.write(tmp_path / "a", "k", config={}, tensors={"t": {"x": tensor}})
        back = artifact.read(folder).tensors("t")["x"]
        assert back.dtype == dtype and back.shape == tensor.shape
        assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))

    def test_strides_shared_memory_and_parameters(self, tmp_path: Path) -> None:
        base = torch.arange(24.0).reshape(4, 6)
        tensors = {
            "transposed": base.t(),
            "row": base[1],
            "rows": base[1:3],
            "step": base[:, ::2],
            "expanded": torch.ones(1, 3).expand(4, 3),
            "tied": base,
            "parameter": torch.nn.Parameter(base),
            "conjugate": torch.tensor([1 + 2j]).conj(),
        }
        back = artifact.read(artifact.write(tmp_path / "a", "k", config={}, tensors={"t": tensors})).tensors("t")
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(back[name], tensor.detach().resolve_conj()), name

    def test_a_view_does_not_drag_its_storage_along(self, tmp_path: Path) -> None:
        folder = artifact.write(tmp_path / "a", "k", config={}, tensors={"t": {"x": torch.zeros(1_000_000)[:4]}})
        assert (folder / "t.safetensors").stat().st_size < 1000

    def test_writing_to_a_loaded_tensor_leaves_the_file(self, tmp_path: Path) -> None:
        folder = write_sample(tmp_path / "a")
        loaded = artifact.read(folder).tensors("model")["weight"]
        before = loaded.clone()
        loaded.fill_(5)
        assert torch.equal(artifact.read(folder).tensors("model")["weight"], before)

    @pytest.mark.gpu
    def test_cuda_tensors(self, tmp_path: Path) -> None:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        tensor = torch.arange(6.0, device="cuda").reshape(2, 3).t()
        folder = artifact.write(tmp_path / "a", "k", config={}, tensors={"t": {"x": tensor, "y": tensor[0]}})
        back = artifact.read(folder).tensors("t", "cuda")
        assert back["x"].is_cuda and torch.equal(back["x"], tensor) and torch.equal(back["y"], tensor[0])

    @given(value=st.dictionaries(st.text().filter(lambda k: k != "$float"), JSON_VALUES, max_size=4))
    def test_json_values(self, value: dict[str, Any]) -> None:
        assert same(from_json(json.loads(json.dumps(to_json(value), allow_nan=False))), value)

    def test_numbers_of_other_libraries(self) -> None:
        value = {"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True), "d": torch.tensor(2.0), "e": np.arange(2)}
        assert same(
            to_json({**value, "f": Path("x/y")}), {"a": 0.5, "b": 3, "c": True, "d": 2.0, "e": [0, 1], "f": "x/y"}
        )


class TestBadArguments:
    @pytest.mark.parametrize("config", [{"a": {1: 2}}, {"a": [object()]}, {"a": torch.zeros(2)}, {"a": {1, 2}}])
    def test_config_without_json_form(self, tmp_path: Path, config: dict[str, Any]) -> None:
        with pytest.raises(TypeError, match=r"config\.a"):
            artifact.write(tmp_path / "a", "k", config=config)
        assert list(tmp_path.iterdir()) == []

    def test_reserved_key(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"config.*\$float"):
            artifact.write(tmp_path / "a", "k", config={"$float": "x"})

    @pytest.mark.parametrize("stem", ["a/b", "..", "", ".hidden", "a b"])
    def test_stem_must_be_a_plain_name(self, tmp_path: Path, stem: str) -> None:
        with pytest.raises(ValueError, match="tensors must be a plain name"):
            artifact.write(tmp_path / "a", "k", config={}, tensors={stem: {"x": torch.zeros(1)}})

    @pytest.mark.parametrize(
        ("tensor", "reason"),
        [
            (torch.zeros(2, 2).to_sparse(), "dense"),
            (torch.empty(2, device="meta"), "dense"),
            (np.zeros(2), "must be a tensor"),
            (torch.zeros(2, dtype=torch.complex128), "complex128"),
        ],
    )
    def test_tensors_that_cannot_be_stored(self, tmp_path: Path, tensor: Any, reason: str) -> None:
        with pytest.raises(TypeError, match=reason):
            artifact.write(tmp_path / "a", "k", config={}, tensors={"t": {"x": tensor}})
        assert list(tmp_path.iterdir()) == []

    def test_unknown_tensors(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="no tensors 'weights'; it has images, model"):
            artifact.read(write_sample(tmp_path / "a")).tensors("weights")


class TestPlace:
    def test_existing_result_is_kept(self, tmp_path: Path) -> None:
        write_sample(tmp_path / "a")
        with pytest.raises(ArtifactError, match="a result is there already"):
            write_sample(tmp_path / "a", config={"new": 1})
        assert artifact.read(tmp_path / "a").config["name"] == "badnets"

    def test_overwrite_replaces_all_of_it(self, tmp_path: Path) -> None:
        write_sample(tmp_path / "a")
        artifact.write(tmp_path / "a", "defense", config={"new": 1}, overwrite=True)
        read = artifact.read(tmp_path / "a", "defense")
        assert read.config == {"new": 1} and read.stems == [] and leftovers(tmp_path) == []

    def test_overwrite_where_nothing_is(self, tmp_path: Path) -> None:
        assert artifact.read(write_sample(tmp_path / "a", overwrite=True)).kind == "attack"

    def test_empty_folder_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        assert artifact.read(write_sample(tmp_path / "a")).kind == "attack"

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_other_peoples_folder_is_never_replaced(self, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(ArtifactError, match="holds other files"):
            write_sample(tmp_path, overwrite=overwrite)
        assert (tmp_path / "thesis.tex").read_text() == "years of work"

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_target_is_a_file(self, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "a").write_text("x")
        with pytest.raises(ArtifactError, match="it is a file"):
            write_sample(tmp_path / "a", overwrite=overwrite)

    def test_parent_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("x")
        with pytest.raises(ArtifactError, match=f"cannot write {tmp_path}/a/b"):
            write_sample(tmp_path / "a" / "b")

    def test_another_writer_wins_the_race(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = _atomic.sync
        done = []

        def late(path: Path) -> None:
            if path.name.startswith(_atomic.TEMP_PREFIX) and not done:
                done.append(path)
                write_sample(tmp_path / "a", config={"winner": True})
            real(path)

        monkeypatch.setattr(_atomic, "sync", late)
        with pytest.raises(ArtifactError, match="another process has just written"):
            write_sample(tmp_path / "a")
        assert artifact.read(tmp_path / "a").config == {"winner": True} and leftovers(tmp_path) == []


class TestSwapWithoutExchange:
    """File systems that cannot exchange two names: a kill between the two renames leaves the old one to be found."""

    @pytest.fixture(autouse=True)
    def no_exchange(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_atomic, "_exchange", lambda a, b: False)

    def test_overwrite(self, tmp_path: Path) -> None:
        write_sample(tmp_path / "a")
        write_sample(tmp_path / "a", config={"new": 1}, overwrite=True)
        assert artifact.read(tmp_path / "a").config == {"new": 1} and leftovers(tmp_path) == []

    def test_killed_between_the_renames(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_sample(tmp_path / "a")
        rename, calls = os.rename, []

        def killed(source: Path, target: Path) -> None:
            calls.append(target)
            if len(calls) == 2:
                raise KeyboardInterrupt
            rename(source, target)

        monkeypatch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write_sample(tmp_path / "a", config={"new": 1}, overwrite=True)
        monkeypatch.undo()
        assert not (tmp_path / "a").exists()
        assert artifact.exists(tmp_path / "a") and artifact.read(tmp_path / "a").config["name"] == "badnets"
        with pytest.raises(ArtifactError, match="there already"):
            write_sample(tmp_path / "a", config={"new": 2})
        write_sample(tmp_path / "a", config={"new": 2}, overwrite=True)
        assert artifact.read(tmp_path / "a").config == {"new": 2} and leftovers(tmp_path) == []


def test_exchange_leaves_a_whole_result_for_every_reader(tmp_path: Path) -> None:
    """Readers in a loop while a writer replaces the folder again and again: one version or another, never a mixture."""
    folder = tmp_path / "a"

    def version(i: int) -> None:
        tensors = {"t": {"x": torch.full((2000,), float(i))}}
        artifact.write(folder, "k", config={"i": i}, metrics={"i": i}, tensors=tensors, overwrite=True)

    version(0)
    stop, problems, seen = threading.Event(), [], set()

    def reader() -> None:
        while not stop.is_set():
            try:
                read = artifact.read(folder)
                values = {read.config["i"], read.metrics["i"], *read.tensors("t")["x"].unique().tolist()}
                assert len(values) == 1, values
                seen.add(read.config["i"])
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=reader) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(1, 60):
        version(i)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == [] and len(seen) > 1 and artifact.read(folder).config == {"i": 59}


class TestDamage:
    def files(self) -> list[str]:
        return [
            "manifest.json",
            "config.json",
            "metrics.json",
            "extra.json",
            "log.jsonl",
            "model.safetensors",
            "images.safetensors",
        ]

    @pytest.mark.parametrize("index", range(7))
    @pytest.mark.parametrize("verify", [True, "lazy"])
    def test_one_flipped_bit_anywhere_is_found(self, tmp_path: Path, index: int, verify: Any) -> None:
        name = self.files()[index]
        path = write_sample(tmp_path / "a") / name
        good = path.read_bytes()
        positions = np.random.default_rng(index).choice(len(good), size=min(40, len(good)), replace=False)
        for position in [0, len(good) - 1, *positions.tolist()]:
            bad = bytearray(good)
            bad[position] ^= 1 << (position % 8)
            path.write_bytes(bytes(bad))
            with pytest.raises(
                (CorruptArtifactError, NewerFormatError), match=name.replace(".", r"\.") + "|has format"
            ):
                read = artifact.read(tmp_path / "a", verify=verify)
                for stem in read.stems:
                    read.tensors(stem)
        path.write_bytes(good)
        assert artifact.read(tmp_path / "a", verify=verify).kind == "attack"

    def test_bits_all_over_the_manifest(self, tmp_path: Path) -> None:
        path = artifact.write(tmp_path / "a", "k", config={}) / "manifest.json"
        good = path.read_bytes()
        for bit in range(0, 8 * len(good), 7):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << (bit % 8)
            path.write_bytes(bytes(bad))
            with pytest.raises((CorruptArtifactError, NewerFormatError)):
                artifact.read_manifest(tmp_path / "a")

    @pytest.mark.parametrize("index", range(7))
    @pytest.mark.parametrize("verify", [True, "lazy", False])
    def test_truncated_missing_and_emptied(self, tmp_path: Path, index: int, verify: Any) -> None:
        path = write_sample(tmp_path / "a") / self.files()[index]
        good = path.read_bytes()
        # The manifest ends with a line break, which says nothing.
        for bad in (good[:-2], good[: len(good) // 2], b"", good + b"x"):
            path.write_bytes(bad)
            with pytest.raises(CorruptArtifactError, match=f"{path} is damaged.*remove the folder and make it again"):
                artifact.read(tmp_path / "a", verify=verify)
        path.unlink()
        with pytest.raises(CorruptArtifactError, match=f"{path} is missing"):
            artifact.read(tmp_path / "a", verify=verify)

    def test_files_swapped_between_two_results(self, tmp_path: Path) -> None:
        a, b = write_sample(tmp_path / "a"), write_sample(tmp_path / "b", config={"name": "blended"})
        (a / "config.json").write_bytes((b / "config.json").read_bytes())
        with pytest.raises(CorruptArtifactError, match=r"config\.json"):
            artifact.read(a)

    @pytest.mark.parametrize("version", ["1", True, 0, None])
    def test_a_format_version_is_a_number_from_1(self, tmp_path: Path, version: Any) -> None:
        folder = write_sample(tmp_path / "result")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["format_version"] = version
        manifest["checksum"] = manifest_checksum(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CorruptArtifactError, match=r"manifest\.json is damaged"):
            artifact.read(folder)

    def test_newer_format(self, tmp_path: Path) -> None:
        folder = write_sample(tmp_path / "a")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest |= {"format_version": artifact.FORMAT_VERSION + 1, "bbfast": "9.0"}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(NewerFormatError, match=r"format 2.*up to 1.*bbfast 9\.0.*update"):
            artifact.read(folder)

    @pytest.mark.parametrize(
        "text",
        [
            *("[]", "{}", "null", "3", '{"format_version": 1}', "\xff", "[" * 50_000),
            *('{"format_version": 1, "$float": "nan"}', '{"format_version": NaN}', '{"format_version": 1e400}'),
        ],
    )
    def test_a_manifest_of_something_else(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
        with pytest.raises(CorruptArtifactError, match=r"manifest\.json is damaged"):
            artifact.read(tmp_path)

    @pytest.mark.parametrize(
        "change",
        [
            {"files": {"../secret": {"size": 1, "sha256": ""}}},
            {"files": {"config.json": 3}},
            {"files": []},
            {"kind": 4},
        ],
    )
    def test_a_crafted_manifest_with_a_right_checksum(self, tmp_path: Path, change: dict[str, Any]) -> None:
        from bbfast._artifact_read import manifest_checksum

        folder = write_sample(tmp_path / "a")
        manifest = json.loads((folder / "manifest.json").read_text()) | change
        manifest["checksum"] = manifest_checksum(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CorruptArtifactError, match="an entry is missing or has the wrong type"):
            artifact.read(folder)

    def test_not_a_result(self, tmp_path: Path) -> None:
        (tmp_path / "photo.jpg").write_bytes(b"x")
        with pytest.raises(ArtifactError, match=r"is no bbfast result: it has no manifest\.json; give the folder"):
            artifact.read(tmp_path)
        with pytest.raises(ArtifactError, match="there is no such folder"):
            artifact.read(tmp_path / "nowhere")
        with pytest.raises(ArtifactError, match="it is a file"):
            artifact.read(tmp_path / "photo.jpg")
        assert not artifact.exists(tmp_path) and not artifact.exists(tmp_path / "nowhere")

    def test_another_kind(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="holds a result of kind 'attack', expected 'defense'"):
            artifact.read(write_sample(tmp_path / "a"), "defense")

    def test_unverified_read_skips_the_checksum_of_tensors_only(self, tmp_path: Path) -> None:
        folder = write_sample(tmp_path / "a")
        data = bytearray((folder / "images.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "images.safetensors").write_bytes(bytes(data))
        assert artifact.read(folder, verify=False).tensors("images")["images"].shape == (5, 3, 4, 4)
        lazy = artifact.read(folder, verify="lazy")
        assert "weight" in lazy.tensors("model")
        with pytest.raises(CorruptArtifactError, match=r"images\.safetensors is damaged"):
            lazy.tensors("images")


class TestDisk:
    def test_full_disk(self, small_disk: Path) -> None:
        kept = write_sample(small_disk / "kept")
        big = {"t": {"x": torch.zeros(1_000_000)}}
        with pytest.raises(
            ArtifactError, match=f"cannot write {small_disk}/big: No space left on device; free some space"
        ):
            artifact.write(small_disk / "big", "k", config={}, tensors=big)
        with pytest.raises(ArtifactError, match="No space left"):
            artifact.write(kept, "k", config={}, tensors=big, overwrite=True)
        with pytest.raises(ArtifactError, match="No space left"):
            artifact.write(small_disk / "big", "k", config={"x": "y" * 2_000_000})
        assert [p.name for p in small_disk.iterdir()] == ["kept"] and artifact.read(kept).kind == "attack"
        small = {"t": {"x": torch.zeros(100)}}
        assert artifact.read(artifact.write(small_disk / "big", "k", config={}, tensors=small)).stems == ["t"]

    def test_read_only_disk(self, small_disk: Path) -> None:
        kept = write_sample(small_disk / "kept")
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        for target, overwrite in ((small_disk / "new" / "deep", False), (kept, True)):
            with pytest.raises(ArtifactError, match=f"cannot write {target}: Read-only file system; choose a folder"):
                write_sample(target, overwrite=overwrite)
        assert artifact.read(kept).kind == "attack"

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
    @pytest.mark.parametrize("at", ["write_bytes", "sync"])
    def test_any_failure_is_explained_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, at: str
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(code, os.strerror(code), "somewhere")

        monkeypatch.setattr(_atomic, at, fail)
        with pytest.raises(ArtifactError, match=rf"cannot write {tmp_path}/a: {os.strerror(code)}; \w+"):
            write_sample(tmp_path / "a")
        assert list(tmp_path.iterdir()) == []

    def test_unreadable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = write_sample(tmp_path / "a")

        def fail(path: Path) -> bytes:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(Path, "read_bytes", fail)
        with pytest.raises(ArtifactError, match=r"cannot read .*manifest\.json: Permission denied"):
            artifact.read(folder)


WRITERS = """
import os, sys, torch
from pathlib import Path
from bbfast import artifact
torch.set_num_threads(1)
folder = Path(sys.argv[1])
for start in sys.stdin:
    child = os.fork()
    if child == 0:
        i = int(start)
        while True:
            i += 1
            tensors = {stem: {"x": torch.full((30_000,), float(i))} for stem in "ab"}
            artifact.write(folder, "k", config={"i": i}, metrics={"i": i}, tensors=tensors, overwrite=True)
            os.write(1, f"{os.getpid()}\\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(1, f"ended {code}\\n".encode())
"""


def test_sigkill_at_random_moments_leaves_a_whole_result(tmp_path: Path) -> None:
    """Processes killed while they write the same artefact over and over."""
    folder = tmp_path / "a"
    generator = np.random.default_rng(0)
    found = set()
    with subprocess.Popen([sys.executable, "-c", WRITERS, str(folder)], **PIPES) as writers:
        assert writers.stdin is not None and writers.stdout is not None
        for kill in range(12):
            writers.stdin.write(f"{1000 * kill}\n")
            writers.stdin.flush()
            child = int(writers.stdout.readline())
            start = time.perf_counter()
            writers.stdout.readline()
            # Somewhere in the next write, however slow the machine is just now.
            time.sleep(float(generator.uniform(0, 1)) * (time.perf_counter() - start))
            os.kill(child, signal.SIGKILL)
            while (line := writers.stdout.readline()) == f"{child}\n":
                pass
            assert line == f"ended {-signal.SIGKILL}\n"
            read = artifact.read(folder)
            values = {read.config["i"], read.metrics["i"]}
            for stem in ("a", "b"):
                values |= set(read.tensors(stem)["x"].unique().tolist())
            assert len(values) == 1 and values.pop() > 1000 * kill
            found.add(read.config["i"])
        writers.stdin.close()
    assert len(found) == 12
    assert leftovers(tmp_path), "no writer was killed in the middle: the test shows nothing"
    removed = _atomic.remove_stale(tmp_path, min_age=-1, max_age=3600)
    assert leftovers(tmp_path) == [] and all(p.name.startswith(_atomic.TEMP_PREFIX) for p in removed)


class TestStale:
    def test_living_processes_keep_their_folders(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError), _atomic.new_folder(tmp_path / "a", replace=False) as temp:
            assert _atomic.remove_stale(tmp_path, min_age=-1, max_age=3600) == []
            assert temp.is_dir()
            raise RuntimeError
        assert list(tmp_path.iterdir()) == []

    def test_young_ones_and_other_machines_are_kept_until_old(self, tmp_path: Path) -> None:
        here = tmp_path / f"{_atomic.TEMP_PREFIX}{_atomic._host()}-{2**22 + 1}-abc"  # above the largest process number
        there = tmp_path / f"{_atomic.TEMP_PREFIX}00000000-1-abc"
        for folder in (here, there):
            folder.mkdir()
        assert _atomic.remove_stale(tmp_path, min_age=60, max_age=3600) == []
        os.utime(here, (time.time() - 120,) * 2)
        os.utime(there, (time.time() - 120,) * 2)
        assert _atomic.remove_stale(tmp_path, min_age=60, max_age=3600) == [here]
        os.utime(there, (time.time() - 7200,) * 2)
        assert _atomic.remove_stale(tmp_path, min_age=60, max_age=3600) == [there]

    def test_a_clock_set_back_removes_nothing(self, tmp_path: Path) -> None:
        folder = tmp_path / f"{_atomic.TEMP_PREFIX}{_atomic._host()}-{2**22 + 1}-abc"
        folder.mkdir()
        os.utime(folder, (time.time() + 10**6,) * 2)
        assert _atomic.remove_stale(tmp_path, min_age=60, max_age=3600) == []


def test_meta_may_hold_floats_that_json_cannot_write(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "result", meta={"loss": math.nan, "best": math.inf})
    meta = from_json(artifact.read(folder).manifest["meta"])
    assert math.isnan(meta["loss"]) and meta["best"] == math.inf
