"""The error-correcting code of SSBA's secret: binary BCH of length 127 over GF(2^7), systematic and shortened."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TEXT_CODES", "bch_generator", "bch_parity", "text_bits"]

_PRIMITIVE = 0b10001001
_ORDER = 127

TEXT_CODES = {100: (7, 5), 50: (4, 2)}
"""Secret length in bits: characters of the text, errors that its code corrects."""


def bch_generator(errors: int) -> int:
    """Generator polynomial of the code that corrects ``errors`` errors, bit i the coefficient of x^i.

    The product of the minimal polynomials of a, a^3, ..., a^(2 errors - 1), with ``a`` a root of x^7 + x^3 + 1.

    Args:
        errors: 1 to 9; beyond that the minimal polynomials are no longer all of degree 7 and distinct.

    Raises:
        ValueError: if ``errors`` is outside 1..9.
    """
    if not 1 <= errors <= 9:
        raise ValueError(f"errors must lie in 1..9, got {errors}")
    power = [1]
    while len(power) < _ORDER:
        doubled = power[-1] << 1
        power.append(doubled ^ _PRIMITIVE if doubled >> 7 else doubled)
    log = {value: exponent for exponent, value in enumerate(power)}
    generator = 1
    for odd in range(1, 2 * errors, 2):
        minimal = [1]  # coefficients in GF(2^7), lowest first; in the end all of them are 0 or 1
        for k in range(7):
            root = odd * 2**k % _ORDER
            scaled = [power[(log[c] + root) % _ORDER] if c else 0 for c in minimal]
            minimal = [a ^ b for a, b in zip([*scaled, 0], [0, *minimal], strict=True)]
        factor = sum(bit << i for i, bit in enumerate(minimal))
        generator = _multiply(generator, factor)
    return generator


def bch_parity(data: bytes, errors: int) -> bytes:
    """Check bits of ``data``, most significant bit first, filled up with zero bits to whole bytes.

    Raises:
        ValueError: if data and check bits exceed the code's 127 bits.
    """
    generator = bch_generator(errors)
    degree = generator.bit_length() - 1
    if 8 * len(data) + degree > _ORDER:
        raise ValueError(f"data must be at most {(_ORDER - degree) // 8} bytes with {errors} errors, got {len(data)}")
    rest = int.from_bytes(data, "big") << degree
    while (excess := rest.bit_length() - generator.bit_length()) >= 0:
        rest ^= generator << excess
    size = -(-degree // 8)
    return (rest << (8 * size - degree)).to_bytes(size, "big")


def text_bits(text: str, length: int) -> Tensor:
    """A secret text as bits: characters padded with spaces, check bits, zeros up to ``length``.

    Args:
        text: ASCII, at most 7 characters for 100 bits, 4 for 50.
        length: 100 or 50.

    Returns:
        float32 ``[length]`` of zeros and ones.

    Raises:
        ValueError: if the length is neither, or the text is too long or not ASCII.
    """
    if length not in TEXT_CODES:
        raise ValueError(f"a text needs secret_bits {' or '.join(map(str, TEXT_CODES))}, got {length}")
    characters, errors = TEXT_CODES[length]
    if not text.isascii() or len(text) > characters:
        raise ValueError(f"secret must be at most {characters} ASCII characters for {length} bits, got {text!r}")
    data = text.ljust(characters).encode("ascii")
    word = data + bch_parity(data, errors)
    bits = [byte >> (7 - k) & 1 for byte in word for k in range(8)]
    return torch.tensor(bits + [0] * (length - len(bits)), dtype=torch.float32)


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials over GF(2)."""
    product = 0
    for i in range(b.bit_length()):
        if b >> i & 1:
            product ^= a << i
    return product
