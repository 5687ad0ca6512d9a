"""Whether a picture that others are made from is missing from an H.264 stream: its numbers tell.

A decoder that misses one puts another in its place and says nothing; what follows is garbage up to
the next key frame. Reference pictures are numbered, so a gap is seen without decoding anything.

Source: ITU-T H.264, 7.3.2.1 (sequence parameter set), 7.3.3 (slice header), 7.4.3 (``frame_num``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_SLICE, _KEY_SLICE, _SEQUENCE, _PICTURE = 1, 5, 7, 8  # types of NAL units
_WITH_CHROMA = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 134, 135, 138, 139})
_HEADER = 32  # bytes, in which the part of a slice header that is read always ends


@dataclass(frozen=True)
class _Sequence:
    bits: int  # of a number
    planes: bool  # each colour plane is a picture of its own
    gaps: bool  # numbers may be left out on purpose


class FrameNumbers:
    """The numbers of one stream's pictures, in the order of decoding.

    Args:
        extradata: of the codec: parameter sets, and whether units are led by their length, as in
            an ``avcC`` record, or by a start code.
    """

    def __init__(self, extradata: bytes | None) -> None:
        self._sequences: dict[int, _Sequence] = {}
        self._pictures: dict[int, int] = {}  # the sequence of each picture parameter set
        self._last: int | None = None  # number of the reference picture before
        self._length = 0  # bytes of a unit's length; 0: start codes
        if extradata and extradata[0] == 1:
            self._length = (extradata[4:5] or b"\3")[0] % 4 + 1
            self._any_gap(_of_config(extradata))
        elif extradata:
            self._any_gap(_after_start_codes(extradata))

    def lost(self, packet: bytes, key: bool) -> bool:
        """Whether a reference picture is missing before one of ``packet``.

        At a key frame counting begins anew: what came before it is not needed any more. What
        cannot be understood here is left to the decoder.
        """
        if key:
            self._last = None
        length = self._length
        return self._any_gap(_of_lengths(packet, length) if length else _after_start_codes(packet))

    def _any_gap(self, units: Iterator[bytes]) -> bool:
        """Whether there is one before any unit; all are looked at, for what they tell of others."""
        try:
            return sum(self._gap(unit) for unit in units if unit) > 0
        except IndexError:  # a unit that ends before its header does
            return False

    def _gap(self, unit: bytes) -> bool:
        kind = unit[0] & 31
        if kind == _SEQUENCE:
            number, sequence = _sequence(_Bits(unit))
            self._sequences[number] = sequence
        elif kind == _PICTURE:
            bits = _Bits(unit[:_HEADER])
            self._pictures[bits.exp()] = bits.exp()
        elif kind in (_SLICE, _KEY_SLICE):
            return self._gap_before(unit, kind)
        return False

    def _gap_before(self, unit: bytes, kind: int) -> bool:
        bits = _Bits(unit[:_HEADER])
        if bits.exp():  # not the first slice of its picture
            return False
        bits.exp()  # slice_type
        sequence = self._sequences.get(self._pictures.get(bits.exp(), -1))
        if sequence is None:
            return False
        if sequence.planes:
            bits.take(2)
        number, last = bits.take(sequence.bits), self._last
        if kind == _KEY_SLICE or last is None:
            self._last = number
            return False
        if unit[0] >> 5 & 3:  # others may be made from it
            self._last = number
        return not sequence.gaps and (number - last) % (1 << sequence.bits) > 1


class _Bits:
    """Bits of a NAL unit behind its first byte, without the bytes that keep start codes away."""

    def __init__(self, unit: bytes) -> None:
        self._data = unit[1:].replace(b"\0\0\3", b"\0\0")
        self._at = 0

    def take(self, count: int) -> int:
        value = 0
        for _ in range(count):
            byte = self._data[self._at >> 3]
            value = value << 1 | byte >> (7 - (self._at & 7)) & 1
            self._at += 1
        return value

    def exp(self) -> int:
        """An Exp-Golomb number, ue(v)."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)

    def signed(self) -> int:
        """se(v)."""
        value = self.exp()
        return (value + 1) // 2 if value % 2 else -(value // 2)


def _sequence(bits: _Bits) -> tuple[int, _Sequence]:
    """Number and contents of a sequence parameter set."""
    profile = bits.take(8)
    bits.take(16)
    number = bits.exp()
    planes, chroma = False, 1
    if profile in _WITH_CHROMA:
        chroma = bits.exp()
        planes = chroma == 3 and bool(bits.take(1))
        bits.exp(), bits.exp(), bits.take(1)
        if bits.take(1):
            for i in range(12 if chroma == 3 else 8):
                if bits.take(1):
                    _skip_scaling(bits, 16 if i < 6 else 64)
    size = bits.exp() + 4
    order = bits.exp()
    if order == 0:
        bits.exp()
    elif order == 1:
        bits.take(1), bits.signed(), bits.signed()
        for _ in range(bits.exp()):
            bits.signed()
    bits.exp()
    return number, _Sequence(size, planes, bool(bits.take(1)))


def _skip_scaling(bits: _Bits, count: int) -> None:
    last = following = 8
    for _ in range(count):
        if following:
            following = (last + bits.signed()) % 256
        last = following or last


def _of_config(data: bytes) -> Iterator[bytes]:
    """Parameter sets in an ``avcC`` record."""
    at = 5
    for mask in (31, 255):
        count, at = data[at] & mask, at + 1
        for _ in range(count):
            size = int.from_bytes(data[at : at + 2])
            yield data[at + 2 : at + 2 + size]
            at += 2 + size


def _of_lengths(data: bytes, length: int) -> Iterator[bytes]:
    at = 0
    while at + length < len(data):
        size = int.from_bytes(data[at : at + length])
        yield data[at + length : at + length + size]
        at += length + size


def _after_start_codes(data: bytes) -> Iterator[bytes]:
    at = data.find(b"\0\0\1")
    while at >= 0:
        following = data.find(b"\0\0\1", at + 3)
        yield data[at + 3 : following if following >= 0 else len(data)]
        at = following
