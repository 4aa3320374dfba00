"""Ed25519 signatures (RFC 8032, 5.1). Points are (X, Y, Z, T): x = X/Z, y = Y/Z, xy = T/Z."""

from __future__ import annotations

import functools
import hashlib
from typing import Optional

Point = tuple[int, int, int, int]

P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
ROOT = pow(2, (P - 1) // 4, P)  # of -1
NEUTRAL: Point = (0, 1, 1, 0)


def _add(a: Point, b: Point) -> Point:
    minus, plus = (a[1] - a[0]) * (b[1] - b[0]) % P, (a[1] + a[0]) * (b[1] + b[0]) % P
    t, z = 2 * a[3] * b[3] * D % P, 2 * a[2] * b[2] % P
    e, f, g, h = plus - minus, z - t, z + t, plus + minus
    return e * f % P, g * h % P, f * g % P, e * h % P


def _times(factor: int, point: Point) -> Point:
    product = NEUTRAL
    for bit in f"{factor:b}":
        product = _add(product, product)
        product = _add(product, point) if bit == "1" else product
    return product


def _encode(point: Point) -> bytes:
    inverse = pow(point[2], -1, P)
    x, y = point[0] * inverse % P, point[1] * inverse % P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def _decode(text: bytes) -> Optional[Point]:
    """The point; None if there is none, or if it is not encoded as the RFC says."""
    sign, y = text[31] >> 7, int.from_bytes(text, "little") & (1 << 255) - 1
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    x = x if x * x % P == square else x * ROOT % P
    if y >= P or x * x % P != square or (x == 0 and sign):
        return None
    x = x if x & 1 == sign else P - x
    return x, y, 1, x * y % P


BASE = _decode((4 * pow(5, -1, P) % P).to_bytes(32, "little")) or (0, 0, 0, 0)


@functools.lru_cache(maxsize=1)
def _multiples() -> list[list[Point]]:
    """The multiples of the base point by 0 to 15, and by 16, 256 and so on of these."""
    rows, point = [], BASE
    for _ in range(64):
        row = [NEUTRAL]
        for _ in range(15):
            row.append(_add(row[-1], point))
        rows.append(row)
        point = _add(row[-1], point)
    return rows


def _times_base(factor: int) -> Point:
    """A multiple of the base point: ten times faster, but for the first time."""
    product = NEUTRAL
    for place, row in enumerate(_multiples()):
        product = _add(product, row[factor >> 4 * place & 15])
    return product


def _hash(*parts: bytes) -> int:
    return int.from_bytes(hashlib.sha512(b"".join(parts)).digest(), "little")


def _scalar(seed: bytes) -> int:
    return _hash(seed) & (1 << 254) - 8 | 1 << 254


@functools.lru_cache(maxsize=8)
def public_key(seed: bytes) -> bytes:
    """The public key, 32 bytes, of a secret key, 32 random bytes."""
    return _encode(_times_base(_scalar(seed)))


def sign(seed: bytes, message: bytes) -> bytes:
    """The signature, 64 bytes."""
    nonce = _hash(hashlib.sha512(seed).digest()[32:], message) % ORDER
    commitment = _encode(_times_base(nonce))
    answer = nonce + _hash(commitment, public_key(seed), message) * _scalar(seed)
    return commitment + (answer % ORDER).to_bytes(32, "little")


def verify(key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether a signature of a message is by this public key. Any bytes may be given."""
    point = _decode(key) if (len(key), len(signature)) == (32, 64) else None
    answer = int.from_bytes(signature[32:], "little")
    if point is None or answer >= ORDER:
        return False
    challenge = _hash(signature[:32], key, message) % ORDER
    minus: Point = (P - point[0], point[1], 1, P - point[3])
    return _encode(_add(_times(answer, BASE), _times(challenge, minus))) == signature[:32]
