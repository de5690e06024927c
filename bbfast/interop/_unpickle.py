"""A pickle reader that can make plain values and nothing else.

It is an interpreter of its own for the opcodes of protocols 2 to 5, not a filter in front of :mod:`pickle`: it has no
import, no attribute access and no call of anything that the stream names. A name in the stream is looked up in a table
given by the caller; whatever is not in the table is refused. Lengths are checked against the bytes that are there
before anything is allocated, so a file cannot claim more than it holds.
"""

from __future__ import annotations

import abc
import dataclasses
import struct
from collections.abc import Callable, Mapping
from typing import Any

from bbfast.errors import CorruptArtifactError, UnsafeFileError

__all__ = ["Allowed", "Names", "Rebuilt", "Unpickler"]

Make = Callable[..., Any]
Names = Mapping[tuple[str, str], Make]

_LONGEST_INTEGER = 64
"""Bytes of a whole number; those of real files have at most 11 (the magic number of torch)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Allowed:
    """A name of the table: what REDUCE and NEWOBJ may use, and inert anywhere else."""

    name: tuple[str, str]
    make: Make


class Rebuilt(abc.ABC):
    """A stand-in for an object of the file that is made first and filled afterwards (BUILD)."""

    @abc.abstractmethod
    def fill(self, state: Any) -> None:
        """Take the state; raises ``ValueError`` or ``TypeError`` if it is not of the expected form."""


class Unpickler:
    """Reads one pickle after another from a buffer.

    Args:
        data: The bytes.
        names: What a name in the stream stands for, by module and name.
        persistent: What a persistent id stands for; None refuses them.
        where: What is read, for messages.
        at: Where to start.
    """

    def __init__(
        self,
        data: bytes | memoryview,
        names: Names,
        persistent: Callable[[Any], Any] | None,
        where: str,
        at: int = 0,
    ) -> None:
        self.data, self.names, self.persistent, self.where, self.at = data, names, persistent, where, at

    def load(self) -> Any:
        """The next value; ``at`` then stands behind it.

        Raises:
            UnsafeFileError: if the stream names something that is not in the table, or asks for it to be used.
            CorruptArtifactError: if the stream ends early or is no pickle of protocol 2 to 5.
        """
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        start = self.at
        if self._byte() != 0x80:
            raise self._bad("it does not begin like a pickle of protocol 2 to 5")
        self.at = start
        try:
            while (code := self._byte()) != _STOP:
                step = _STEPS.get(code)
                if step is None:
                    raise self._refuse(f"opcode 0x{code:02x}")
                step(self)
            value = self._pop()
        except (TypeError, ValueError, LookupError, OverflowError, UnicodeError, struct.error) as error:
            # Whatever does not fit together: the file's fault, not a bug to be shown as one.
            raise self._bad(f"{type(error).__name__}: {error}") from None
        if self._stack or self._marks:
            raise self._bad("values are left over")
        return value

    # Reading ----------------------------------------------------------------------------------------------------------

    def _byte(self) -> int:
        if self.at >= len(self.data):
            raise self._bad("it ends in the middle")
        self.at += 1
        return self.data[self.at - 1]

    def _take(self, length: int) -> bytes:
        if length > len(self.data) - self.at:
            raise self._bad(f"it claims a value of {length} bytes and has {len(self.data) - self.at} left")
        self.at += length
        return bytes(self.data[self.at - length : self.at])

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        raw = bytearray()
        while (byte := self._byte()) != 0x0A:
            raw.append(byte)
        return raw.decode("utf-8")

    def _bad(self, what: str) -> CorruptArtifactError:
        return CorruptArtifactError(f"{self.where} is damaged or no file of torch.save: {what} (near byte {self.at})")

    def _refuse(self, what: str) -> UnsafeFileError:
        return UnsafeFileError(
            f"{self.where} was refused: it asks for {what}, which no attack result holds and bbfast does not load from "
            "a file; nothing of it was executed"
        )

    # The stack --------------------------------------------------------------------------------------------------------

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise self._bad("a value is missing")
        return self._stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _pop_mark(self) -> list[Any]:
        if not self._marks:
            raise self._bad("a mark is missing")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _tuple(self, length: int) -> None:
        items = [self._pop() for _ in range(length)]
        self._push(tuple(reversed(items)))

    # Containers -------------------------------------------------------------------------------------------------------

    def _set_items(self, pairs: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(pairs) % 2:
            raise self._bad(f"entries for a {type(target).__name__}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[_plain(key)] = value

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise self._bad(f"items for a {type(target).__name__}")
        target.extend(items)

    def _add(self) -> None:
        items, target = self._pop_mark(), self._top()
        if not isinstance(target, set):
            raise self._bad(f"members for a {type(target).__name__}")
        target.update(map(_plain, items))

    def _dict(self) -> None:
        pairs = self._pop_mark()
        self._push({})
        self._set_items(pairs)

    # Names and objects ------------------------------------------------------------------------------------------------

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self._bad("a name that is no text")
        if (module, name) not in self.names:
            # Escaped: the name goes to somebody's terminal.
            raise self._refuse(f"{module[:80]}.{name[:80]}".encode("unicode_escape").decode())
        self._push(Allowed((module, name), self.names[module, name]))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._global(module, name)

    def _call(self, keywords: Any = None) -> None:
        arguments, target = self._pop(), self._pop()
        if not isinstance(target, Allowed):
            raise self._refuse(f"a call of a {type(target).__name__}")
        if not isinstance(arguments, tuple) or keywords:
            raise self._bad(f"a call of {'.'.join(target.name)} whose arguments are no tuple")
        self._push(target.make(*arguments))

    def _new_with_keywords(self) -> None:
        self._call(self._pop())

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if not isinstance(target, Rebuilt):
            raise self._refuse(f"a state for a {type(target).__name__}")
        target.fill(state)

    def _persistent(self) -> None:
        if self.persistent is None:
            raise self._refuse("a persistent id")
        self._push(self.persistent(self._pop()))

    def _protocol(self) -> None:
        version = self._byte()
        if not 2 <= version <= 5:
            raise self._bad(f"it is of pickle protocol {version}, expected 2 to 5")

    def _frame(self) -> None:
        length = self._number("<Q")
        if length > len(self.data) - self.at:
            raise self._bad(f"it claims a frame of {length} bytes and has {len(self.data) - self.at} left")

    def _integer(self, length: int) -> int:
        if not 0 <= length <= _LONGEST_INTEGER:
            raise self._bad(f"a whole number of {length} bytes")
        return int.from_bytes(self._take(length), "little", signed=True)

    def _text(self, length: int) -> str:
        return self._take(length).decode("utf-8", "surrogatepass")

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            raise self._bad(f"it refers to value {index}, which there is not")
        self._push(self._memo[index])

    def _remember(self, index: int) -> None:
        self._memo[index] = self._top()

    def _mark(self) -> None:
        self._marks.append(len(self._stack))


def _plain(key: Any) -> Any:
    """``key`` if it is flat: hashing a deep tuple recurses in C without limit."""
    if key is None or isinstance(key, (str, bytes, int, float)):
        return key
    raise TypeError(f"keys and members must be text or numbers, got {type(key).__name__}")


_STOP = 0x2E
_STEPS: dict[int, Callable[[Unpickler], object]] = {
    0x80: Unpickler._protocol,
    0x95: Unpickler._frame,
    0x28: Unpickler._mark,
    0x30: Unpickler._pop,
    0x31: Unpickler._pop_mark,
    0x32: lambda u: u._push(u._top()),
    # Plain values.
    0x4E: lambda u: u._push(None),
    0x88: lambda u: u._push(True),
    0x89: lambda u: u._push(False),
    0x4A: lambda u: u._push(u._number("<i")),
    0x4B: lambda u: u._push(u._byte()),
    0x4D: lambda u: u._push(u._number("<H")),
    0x8A: lambda u: u._push(u._integer(u._byte())),
    0x8B: lambda u: u._push(u._integer(u._number("<i"))),
    0x47: lambda u: u._push(u._number(">d")),
    0x8C: lambda u: u._push(u._text(u._byte())),
    0x58: lambda u: u._push(u._text(u._number("<I"))),
    0x8D: lambda u: u._push(u._text(u._number("<Q"))),
    0x43: lambda u: u._push(u._take(u._byte())),
    0x42: lambda u: u._push(u._take(u._number("<I"))),
    0x8E: lambda u: u._push(u._take(u._number("<Q"))),
    0x96: lambda u: u._push(u._take(u._number("<Q"))),
    # Containers.
    0x5D: lambda u: u._push([]),
    0x61: lambda u: u._append([u._pop()]),
    0x65: lambda u: u._append(u._pop_mark()),
    0x6C: lambda u: u._push(u._pop_mark()),
    0x29: lambda u: u._push(()),
    0x85: lambda u: u._tuple(1),
    0x86: lambda u: u._tuple(2),
    0x87: lambda u: u._tuple(3),
    0x74: lambda u: u._push(tuple(u._pop_mark())),
    0x7D: lambda u: u._push({}),
    0x64: Unpickler._dict,
    0x73: lambda u: u._set_items([u._pop(), u._pop()][::-1]),
    0x75: lambda u: u._set_items(u._pop_mark()),
    0x8F: lambda u: u._push(set()),
    0x90: Unpickler._add,
    0x91: lambda u: u._push(frozenset(map(_plain, u._pop_mark()))),
    # Memory.
    0x71: lambda u: u._remember(u._byte()),
    0x72: lambda u: u._remember(u._number("<I")),
    0x94: lambda u: u._remember(len(u._memo)),
    0x68: lambda u: u._recall(u._byte()),
    0x6A: lambda u: u._recall(u._number("<I")),
    # Names and objects.
    0x63: lambda u: u._global(u._line(), u._line()),
    0x93: Unpickler._stack_global,
    0x52: Unpickler._call,
    0x81: Unpickler._call,
    0x92: Unpickler._new_with_keywords,
    0x62: Unpickler._build,
    0x51: Unpickler._persistent,
}
"""Opcode to its meaning. Not there, so refused: protocol 0 and 1 (text numbers, INST, OBJ, PERSID), extension codes and
out-of-band buffers."""
