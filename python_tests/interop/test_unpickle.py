"""Files of torch.save through our own reader: what is harmless comes back, nothing harmful runs, nothing crashes."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import random
import struct
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bbfast.errors import ArtifactError, BBFastError, CorruptArtifactError, UnsafeFileError
from bbfast.interop._standins import ArrayValue, PictureValue, TensorValue, allowed_names
from bbfast.interop._torch_file import read_torch_file
from bbfast.interop._unpickle import Unpickler

RAN: list[object] = []


@pytest.fixture(autouse=True)
def _nothing_ran() -> Any:
    RAN.clear()
    yield
    assert not RAN


def fire(*arguments: object) -> None:
    """What a malicious file would call: it leaves a trace."""
    RAN.append(arguments)


# Pickle writes the name of a function; under this one it can be found again, as a real payload can.
_module = types.ModuleType("bbfast_payload")
_module.fire = fire  # type: ignore[attr-defined]
sys.modules["bbfast_payload"] = _module
fire.__module__, fire.__qualname__ = "bbfast_payload", "fire"


class Payload:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Stateful:
    """Pickles as a class with a state, whose ``__setstate__`` would run."""

    def __setstate__(self, state: object) -> None:
        RAN.append(state)

    def __getstate__(self) -> object:
        return {"x": 1}


_module.Stateful = Stateful  # type: ignore[attr-defined]
Stateful.__module__, Stateful.__qualname__ = "bbfast_payload", "Stateful"


def write_zip(path: Path, data: bytes, storages: dict[str, bytes] | None = None, compress: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("attack_result/data.pkl", data)
        for key, content in (storages or {}).items():
            archive.writestr(f"attack_result/data/{key}", content)
        archive.writestr("attack_result/version", "3\n")
    return path


def write_legacy(path: Path, data: bytes) -> Path:
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + data + pickle.dumps([], 2))
    return path


def value(data: bytes) -> Any:
    return Unpickler(data, allowed_names(len(data)), None, "x").load()


class TestHarmless:
    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    @pytest.mark.parametrize("new", [True, False])
    def test_what_results_hold(self, tmp_path: Path, new: bool, protocol: int) -> None:
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        base = torch.arange(12, dtype=torch.float64)
        picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
        arrays = {
            "int": np.arange(5),
            "float": np.linspace(0, 1, 7),
            "bool": np.array([True, False]),
            "fortran": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
            "big": np.arange(3, dtype=">i4"),
            "empty": np.zeros(0, dtype=np.uint8),
        }
        plain = {
            "none": None,
            "flags": [True, False],
            "numbers": (0, -1, 255, 256, 65536, -(2**40), 2**62, 1.5, -0.0),
            "texts": ["", "a", "é" * 300, "x" * 70000],
            "bytes": [b"", b"\x00\xff", b"y" * 300],
            "bytearray": bytearray(b"\x80z"),
            "set": {1, 2},
            "frozen": frozenset({"a"}),
            "nested": [[{}, ()], (((1,),),)],
            "ordered": collections.OrderedDict(a=1, b=2),
        }
        torch.save(
            {
                "model": net.state_dict(),
                "views": [base, base[2:6], base.reshape(3, 4).t()],
                "types": [torch.zeros(2, dtype=d) for d in (torch.bfloat16, torch.half, torch.int8, torch.bool)],
                "parameter": torch.nn.Parameter(torch.ones(2)),
                "arrays": arrays,
                "scalars": {np.int64(7): np.float32(0.5), 8: np.bool_(True)},
                "pictures": [picture, picture.convert("L")],
                "size": torch.Size([2, 3]),
                "devices": [torch.device("cuda:1"), torch.device("cpu")],
                "plain": plain,
            },
            tmp_path / "x.pt",
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=new,
        )
        got = read_torch_file(tmp_path / "x.pt")
        assert {k: v.tensor().tolist() for k, v in got["model"].items()} == {
            k: v.tolist() for k, v in net.state_dict().items()
        }
        assert list(got["model"]) == list(net.state_dict())
        for tensor, expected in zip(got["views"], (base, base[2:6], base.reshape(3, 4).t()), strict=True):
            assert torch.equal(tensor.tensor(), expected) and tensor.stride == expected.stride()
        assert [t.tensor().dtype for t in got["types"]] == [torch.bfloat16, torch.half, torch.int8, torch.bool]
        assert isinstance(got["parameter"], TensorValue) and got["parameter"].tensor().tolist() == [1, 1]
        for key, array in arrays.items():
            read = got["arrays"][key]
            assert (
                isinstance(read, ArrayValue) and np.array_equal(read.array, array) and read.array.dtype == array.dtype
            )
        assert got["scalars"] == {7: 0.5, 8: True} and {type(k) for k in got["scalars"]} == {int}
        assert all(isinstance(p, PictureValue) for p in got["pictures"])
        assert np.array_equal(got["pictures"][0].pixels, np.asarray(picture))
        assert got["pictures"][1].pixels.shape == (4, 4, 1)
        assert got["size"] == (2, 3) and got["devices"] == ["cuda:1", "cpu"]
        assert got["plain"] == plain

    def test_pictures_that_were_read_from_files(self, tmp_path: Path) -> None:
        held = {}
        for suffix in ("png", "jpeg", "ppm", "bmp"):
            Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / f"a.{suffix}")
            held[suffix] = Image.open(tmp_path / f"a.{suffix}")
            held[suffix].load()
        torch.save(held, tmp_path / "x.pt")
        got = read_torch_file(tmp_path / "x.pt")
        assert all(p.pixels.shape == (2, 3, 3) for p in got.values()) and got["png"].pixels[0, 0].tolist() == [1, 2, 3]

    def test_shared_values_and_long_memory(self) -> None:
        shared = ["once"]
        many = [shared] + [str(i) for i in range(500)] + [shared]
        for protocol in (2, 3, 4, 5):
            got = value(pickle.dumps(many, protocol))
            assert got == many and got[0] is got[-1]
        assert value(pickletools.optimize(pickle.dumps(many, 4))) == many

    def test_numpys_old_names(self) -> None:
        data = pickle.dumps(np.arange(3), 2)
        assert b"numpy._core.multiarray\n" in data
        old = value(data.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"))
        assert old.array.tolist() == [0, 1, 2]


def everything_refused(tmp_path: Path, data: bytes, error: type[BBFastError] = UnsafeFileError) -> str:
    """In both formats; the message."""
    texts = []
    for write in (write_zip, write_legacy):
        with pytest.raises(error) as caught:
            read_torch_file(write(tmp_path / "x.pt", data))
        texts.append(str(caught.value))
    assert not RAN and not (tmp_path / "ran").exists()
    return texts[0]


class TestMalicious:
    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_calls(self, tmp_path: Path, protocol: int) -> None:
        cases = [
            Payload(fire, 1),
            Payload(os.system, f"touch {tmp_path}/ran"),
            Payload(eval, f"open({str(tmp_path / 'ran')!r}, 'w')"),
            Payload(exec, "raise SystemExit"),
            Payload(getattr, "x", "upper"),
            Payload(__import__, "os"),
            Payload(open, str(tmp_path / "ran"), "w"),
            Payload(np.load, "x.npy", None, True),
            Payload(np.fromfile, "x"),
            Payload(torch.load, "x.pt"),
            Payload(torch.hub.load, "x", "y"),
            Payload(pickle.loads, pickle.dumps(Payload(fire, 2))),
            Payload(Image.open, "x.png"),
            Payload(type, "X", (), {}),
            Stateful(),
            Path("x"),
            fire,
        ]
        for case in cases:
            for held in (case, {"model": case}, [0, (case, {})], {"other_info": [case, 1]}):
                text = everything_refused(tmp_path, pickle.dumps(held, protocol))
                assert "was refused: it asks for" in text and "nothing of it was executed" in text

    def test_the_message_names_what_was_asked_for(self, tmp_path: Path) -> None:
        text = everything_refused(tmp_path, pickle.dumps(Payload(os.system, "true"), 2))
        assert f"{tmp_path}/x.pt was refused: it asks for {os.name}.system, which no attack result holds" in text

    def test_stack_global_with_computed_and_dotted_names(self, tmp_path: Path) -> None:
        def short(text: str) -> bytes:
            return b"\x8c" + bytes([len(text)]) + text.encode()

        for module, name in (
            ("os", "system"),
            ("builtins", "eval"),
            ("collections", "OrderedDict.__class__"),
            ("collections", "OrderedDict.fromkeys.__globals__"),
            ("torch", "serialization.load"),
            ("torch._utils", "_rebuild_tensor_v2.__globals__"),
            ("numpy", "ndarray.__setstate__"),
            ("PIL.Image", "open"),
            ("PIL.Image", "Image.__init__.__globals__"),
        ):
            call = b"\x80\x04" + short(module) + b"\x94" + short(name) + b"\x94\x93" + short("x") + b"\x85R."
            assert f"{module}.{name}" in everything_refused(tmp_path, call)
            assert f"{module}.{name}" in everything_refused(
                tmp_path, b"\x80\x02c%b\n%b\n." % (module.encode(), name.encode())
            )

    def test_names_from_other_values(self, tmp_path: Path) -> None:
        # The name is no text, but an allowed object; a name that is made of bytes.
        everything_refused(tmp_path, b"\x80\x04ccollections\nOrderedDict\n\x8c\x06system\x93.", CorruptArtifactError)
        everything_refused(tmp_path, b"\x80\x04C\x02os\x8c\x06system\x93.", CorruptArtifactError)

    def test_calling_and_filling_what_is_allowed(self, tmp_path: Path) -> None:
        # A text, a list, an allowed value's result: none can be called, none takes a state.
        assert "a call of a str" in everything_refused(tmp_path, b"\x80\x02X\x01\x00\x00\x00x)R.")
        assert "a call of a list" in everything_refused(tmp_path, b"\x80\x02])\x81.")
        assert "a state for a list" in everything_refused(tmp_path, b"\x80\x02]}b.")
        assert "a state for a Allowed" in everything_refused(tmp_path, b"\x80\x02ccollections\nOrderedDict\n}b.")
        build = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsX\x01\x00\x00\x00xsb."
        assert value(build) == {} and callable(value(build).items)

    @pytest.mark.parametrize("code", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"\x97", b"\x98"])
    def test_extension_codes_and_outside_buffers(self, tmp_path: Path, code: bytes) -> None:
        everything_refused(tmp_path, b"\x80\x05" + code + b".")

    def test_opcodes_of_the_oldest_protocols(self, tmp_path: Path) -> None:
        for data in (
            b"\x80\x02(ios\nsystem\n.",
            b"\x80\x02(cos\nsystem\no.",
            b"\x80\x02Px\n.",
            b"\x80\x02I1\n.",
            b"\x80\x02S'x'\n.",
        ):
            everything_refused(tmp_path, data)
        for protocol in (0, 1):
            everything_refused(tmp_path, pickle.dumps([1], protocol), CorruptArtifactError)

    def test_persistent_ids(self, tmp_path: Path) -> None:
        def with_id(pid: object) -> bytes:
            return b"\x80\x02" + pickle.dumps(pid, 2)[2:-1] + b"Q."

        for pid in (
            "os.system",
            ("module", "os", "x", "y"),
            ("storage", "FloatStorage", "0", "cpu", 1),
            ("storage", 1, "../../etc/passwd", "cpu", 1),
            ("storage", None, 0, "cpu", -1),
            (),
            None,
            [],
        ):
            everything_refused(tmp_path, with_id(pid), CorruptArtifactError)
        # Legacy files once carried the source of a module in a persistent id.
        everything_refused(tmp_path, with_id(("module", fire, "x.py", "source")))
        with pytest.raises(UnsafeFileError, match="a persistent id"):
            value(b"\x80\x02NQ.")

    def test_arrays_of_objects(self, tmp_path: Path) -> None:
        held = np.array([Payload(fire, 3)], dtype=object)
        for protocol in (2, 4, 5):
            everything_refused(tmp_path, pickle.dumps(held, protocol), BBFastError)
        everything_refused(tmp_path, pickle.dumps(np.array([None]), 2), CorruptArtifactError)
        everything_refused(tmp_path, pickle.dumps(np.zeros(1, dtype="i4,f8"), 2), CorruptArtifactError)

    def test_reading_for_real_would_have_run_it(self, tmp_path: Path) -> None:
        """The traces can be seen at all."""
        torch.save({"x": Payload(fire, 4)}, tmp_path / "x.pt")
        torch.load(tmp_path / "x.pt", weights_only=False)
        assert RAN.pop() == (4,)


class TestDamaged:
    @pytest.fixture
    def files(self, tmp_path: Path) -> list[Path]:
        held = {"model": torch.nn.Linear(3, 2).state_dict(), "x": np.arange(9), "names": [str(i) for i in range(20)]}
        paths = [tmp_path / "zip.pt", tmp_path / "legacy.pt"]
        for path, new in zip(paths, (True, False), strict=True):
            torch.save(held, path, _use_new_zipfile_serialization=new)
        return paths

    def test_cut_off_anywhere(self, files: list[Path]) -> None:
        for path in files:
            whole = path.read_bytes()
            for end in range(0, len(whole) - 1, 7):
                path.write_bytes(whole[:end])
                with pytest.raises(CorruptArtifactError, match=r"damaged|no file of torch.save|is empty"):
                    read_torch_file(path)

    def test_changed_anywhere(self, files: list[Path]) -> None:
        draw = random.Random(0)
        for path in files:
            whole = path.read_bytes()
            for _ in range(400):
                broken = bytearray(whole)
                for _ in range(draw.choice((1, 4))):
                    broken[draw.randrange(len(whole))] = draw.randrange(256)
                path.write_bytes(broken)
                try:
                    read_torch_file(path)
                except ArtifactError:
                    continue

    def test_random_opcodes(self) -> None:
        draw = random.Random(1)
        codes = [i.code.encode("latin-1") for i in pickletools.opcodes]
        for _ in range(3000):
            body = b"".join(draw.choice(codes) + draw.randbytes(draw.choice((0, 0, 1, 4))) for _ in range(12))
            try:
                value(b"\x80\x04" + body + b".")
            except ArtifactError:
                continue

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match=r"cannot read .*none.pt: No such file"):
            read_torch_file(tmp_path / "none.pt")
        with pytest.raises(ArtifactError, match="cannot read"):
            read_torch_file(tmp_path)

    def test_other_files(self, tmp_path: Path) -> None:
        path = tmp_path / "x.pt"
        for content in (b"<html>404</html>", b"\x89PNG\r\n\x1a\n", pickle.dumps({"a": 1}), pickle.dumps(5, 4)):
            path.write_bytes(content)
            with pytest.raises(CorruptArtifactError, match=r"no file of torch.save"):
                read_torch_file(path)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "x")
        with pytest.raises(CorruptArtifactError, match=r"0 data.pkl, expected one"):
            read_torch_file(path)

    def test_compressed_and_big_endian(self, tmp_path: Path) -> None:
        path = write_zip(tmp_path / "x.pt", pickle.dumps("x" * 10**6, 2), compress=zipfile.ZIP_DEFLATED)
        with pytest.raises(CorruptArtifactError, match=r"data.pkl' is compressed"):
            read_torch_file(path)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", pickle.dumps(1, 2))
            archive.writestr("a/byteorder", "big")
        with pytest.raises(CorruptArtifactError, match="big-endian"):
            read_torch_file(path)


class TestHugeClaims:
    """Lengths that the file does not have: refused before memory is asked for."""

    @pytest.mark.parametrize(
        "body",
        [
            b"B" + struct.pack("<I", 2**32 - 1),
            b"\x8e" + struct.pack("<Q", 2**62),
            b"\x96" + struct.pack("<Q", 2**63),
            b"X" + struct.pack("<I", 2**31),
            b"\x8d" + struct.pack("<Q", 2**50),
            b"\x95" + struct.pack("<Q", 2**50),
            b"\x8b" + struct.pack("<i", 2**31 - 1),
            b"\x8b" + struct.pack("<i", -5),
            b"Nr" + struct.pack("<I", 2**32 - 1) + b"j" + struct.pack("<I", 2**32 - 2),
        ],
    )
    def test_values(self, tmp_path: Path, body: bytes) -> None:
        everything_refused(tmp_path, b"\x80\x04" + body + b".", CorruptArtifactError)

    def test_a_great_place_in_memory_costs_nothing(self) -> None:
        assert value(b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".") is None

    @pytest.mark.parametrize(
        ("size", "stride", "offset", "match"),
        [
            ((10**12,), (0,), 0, "a tensor of size"),
            ((2,), (5,), 0, "a tensor of size"),
            ((2,), (1,), 7, "a tensor of size"),
            ((2,), (-1,), 3, "no whole number"),
            ((2, 2), (1,), 0, "and stride"),
            ((2,) * 40, (1,) * 40, 0, "no short tuple"),
        ],
    )
    def test_tensors(self, tmp_path: Path, size: Any, stride: Any, offset: int, match: str) -> None:
        with pytest.raises(CorruptArtifactError, match=match):
            read_torch_file(self.tensor(tmp_path, size, stride, offset, 4, bytes(16)))

    def test_storages(self, tmp_path: Path) -> None:
        good = read_torch_file(self.tensor(tmp_path, (4,), (1,), 0, 4, struct.pack("<4f", 1, 2, 3, 4)))
        assert good.tensor().tolist() == [1, 2, 3, 4]
        with pytest.raises(CorruptArtifactError, match=r"claims 1099511627776 elements of 4 bytes and has 16 bytes"):
            read_torch_file(self.tensor(tmp_path, (4,), (1,), 0, 2**40, bytes(16)))
        with pytest.raises(CorruptArtifactError, match="storage '0' is missing"):
            read_torch_file(self.tensor(tmp_path, (4,), (1,), 0, 4, None))

    @staticmethod
    def tensor(folder: Path, size: Any, stride: Any, offset: int, length: int, content: bytes | None) -> Path:
        class Writer(pickle.Pickler):
            def persistent_id(self, obj: Any) -> Any:
                return ("storage", torch.FloatStorage, "0", "cpu", length) if obj == "the storage" else None

        buffer = io.BytesIO()
        rebuilt = Payload(torch._utils._rebuild_tensor_v2, "the storage", offset, size, stride, False, None)
        Writer(buffer, 2).dump(rebuilt)
        return write_zip(folder / "x.pt", buffer.getvalue(), {} if content is None else {"0": content})

    def test_arrays(self, tmp_path: Path) -> None:
        for shape in ((10**9, 10**9), (3,), (-4,)):
            data = pickle.dumps(np.zeros(2), 2).replace(b"K\x02\x85", pickle.dumps(shape, 2)[2:-1])
            everything_refused(tmp_path, data, CorruptArtifactError)

    def test_pictures(self, tmp_path: Path) -> None:
        data = pickle.dumps(Image.new("L", (7, 9)), 2)
        assert value(data).pixels.shape == (9, 7, 1)
        everything_refused(
            tmp_path, data.replace(b"K\x07K\t", b"J" + struct.pack("<i", 2**31 - 1) + b"K\t"), CorruptArtifactError
        )
        everything_refused(tmp_path, pickle.dumps(Image.new("RGBA", (7, 9)), 2), CorruptArtifactError)

    def test_a_text_converted_over_and_over(self, tmp_path: Path) -> None:
        once = (
            b"c_codecs\nencode\nq\x01X"
            + struct.pack("<I", 50_000)
            + b"x" * 50_000
            + b"q\x02X\x06\x00\x00\x00latin1q\x03\x86R"
        )
        again = b"h\x01h\x02h\x03\x86R"
        assert len(value(b"\x80\x02" + once + b".")) == 50_000
        text = everything_refused(tmp_path, b"\x80\x02](" + once + again * 1000 + b"e.", CorruptArtifactError)
        assert "more converted bytes than the file holds" in text

    def test_depth(self) -> None:
        deep = value(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".")
        assert isinstance(deep, list)
        del deep
        # Hashing this key would recurse in C until the process dies.
        with pytest.raises(CorruptArtifactError, match="keys and members must be text or numbers, got tuple"):
            value(b"\x80\x02})" + b"\x85" * 10**5 + b"Ns.")
        tower = b")" + b"\x85" * 10**5
        for head, tail in ((b"cnumpy\ndtype\n", b"\x85R."), (b"ctorch\ndevice\n", b"\x85R.")):
            with pytest.raises(CorruptArtifactError):
                value(b"\x80\x02" + head + tower + tail)
        picture = b"cPIL.Image\nImage\n)\x81(N" + tower + b"K\x01K\x01\x86NC\x01xtb."
        with pytest.raises(CorruptArtifactError, match="a picture must have mode L or RGB, got a tuple"):
            value(b"\x80\x03" + picture)

    def test_names_for_a_terminal(self, tmp_path: Path) -> None:
        text = everything_refused(tmp_path, b"\x80\x02c\x1b[31mos\nsystem\n.")
        assert r"asks for \x1b[31mos.system, which" in text
