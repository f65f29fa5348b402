"""Receipts: a proof, in 128 bits, of which samples were trained on.

The receipt of samples in an epoch is the sum of hash(sample key, epoch) modulo 2**128. It does not depend on the order
of samples, so the receipts of ranks are added up. A missed or repeated sample changes it, and the difference of two
receipts shows which one (``tools/audit.py``).

The metrics' all-reduce also sums the receipts of a step, as floats: digits of 11 bits, of which float32 sums 8192
without rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MODULUS = 1 << 128
_DIGIT_BITS = 11
DIGITS = -(-128 // _DIGIT_BITS)
MOST_PARTS = 2 ** (24 - _DIGIT_BITS)
"""Largest number of receipts that may be summed as digits: ranks × micro-batches."""


def sample_hash(key: str, epoch: int) -> int:
    """128-bit hash of a sample in an epoch."""
    digest = hashlib.blake2b(f"{epoch}\0{key}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def receipt(keys: Iterable[str], epoch: int) -> int:
    """The receipt of samples consumed in an epoch."""
    return sum(sample_hash(key, epoch) for key in keys) % MODULUS


def to_digits(value: int) -> list[float]:
    """``value`` as DIGITS numbers below 2**11, the least significant first."""
    return [float(value >> (_DIGIT_BITS * i) & (1 << _DIGIT_BITS) - 1) for i in range(DIGITS)]


def from_digits(sums: Sequence[float]) -> int:
    """The receipt from sums of digits."""
    return sum(int(digit) << (_DIGIT_BITS * i) for i, digit in enumerate(sums)) % MODULUS


@dataclass(frozen=True)
class DataProgress:
    """What a run has trained on from its beginning up to a step."""

    samples: int = 0
    receipt: int = 0
    bad_in_epoch: int = 0
    """Number of samples of the current epoch that could not be read and were replaced."""

    def plus(self, *, samples: int, receipt: int, bad: int, epoch_begins: bool) -> DataProgress:
        """The progress after one more step."""
        return DataProgress(
            samples=self.samples + samples,
            receipt=(self.receipt + receipt) % MODULUS,
            bad_in_epoch=bad + (0 if epoch_begins else self.bad_in_epoch),
        )

    def to_json(self) -> dict[str, Any]:
        return {"samples": self.samples, "receipt": as_hex(self.receipt), "bad_in_epoch": self.bad_in_epoch}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> DataProgress:
        return cls(raw["samples"], int(raw["receipt"], 16), raw["bad_in_epoch"])


def as_hex(value: int) -> str:
    """A receipt as 32 hexadecimal digits."""
    return f"{value:032x}"
