"""Our Ed25519 against the RFC's vectors and another implementation."""

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hosts import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st

import cachix_ed25519 as ed25519

# RFC 8032, section 7.1: secret key, public key, message, signature in two lines
VECTORS = """\
9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60
d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a
-
e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155
5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b

4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb
3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c
72
92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da
085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00

c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7
fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025
af82
6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac
18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a
"""
FEW = settings(max_examples=20, deadline=None)  # each costs some tens of milliseconds


@pytest.mark.parametrize("vector", VECTORS.split("\n\n"))
def test_the_vectors_of_the_rfc(vector):
    seed, key, text, *halves = (bytes.fromhex(part.strip("-")) for part in vector.split())
    signed = b"".join(halves)
    assert ed25519.public_key(seed) == key
    assert ed25519.sign(seed, text) == signed
    assert ed25519.verify(key, text, signed)


@FEW
@given(st.binary(min_size=32, max_size=32), st.binary(max_size=300), st.integers(0, 511))
def test_it_agrees_with_cryptography(seed, message, bit):
    theirs = Ed25519PrivateKey.from_private_bytes(seed)
    key, signature = ed25519.public_key(seed), ed25519.sign(seed, message)
    assert key == theirs.public_key().public_bytes_raw()
    assert signature == theirs.sign(message)
    assert ed25519.verify(key, message, signature)
    changed = bytearray(signature)
    changed[bit // 8] ^= 1 << bit % 8
    for other in (bytes(changed), signature[:-1], signature + b"x", b""):
        assert not ed25519.verify(key, message, other)
    assert not ed25519.verify(key, message + b"x", signature)


@FEW
@given(st.binary(min_size=32, max_size=32), st.binary(min_size=64, max_size=64))
def test_any_bytes_get_the_same_answer(key, signature):
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, b"m")
        valid = True
    except (InvalidSignature, ValueError):
        valid = False
    assert ed25519.verify(key, b"m", signature) is valid


def test_what_is_not_canonical_is_refused():
    seed = bytes(32)
    key, signature = ed25519.public_key(seed), ed25519.sign(seed, b"m")
    more = int.from_bytes(signature[32:], "little") + ed25519.ORDER
    assert not ed25519.verify(key, b"m", signature[:32] + more.to_bytes(32, "little"))
    for y in (ed25519.P, ed25519.P + 1, 2**255 - 1):  # not below the field's prime
        assert not ed25519.verify(y.to_bytes(32, "little"), b"m", signature)
    minus_zero = (1 | 1 << 255).to_bytes(32, "little")
    assert not ed25519.verify(minus_zero, b"m", signature)
    assert not ed25519.verify(b"", b"m", signature)


def test_it_stays_short():
    assert len((PROJECT / "cachix_ed25519.py").read_text().splitlines()) <= 105
