"""From an address in a compiled kernel to its source line: a reader of DWARF 4 line tables.

File numbers are ignored, since the compiler is given line numbers that also say which file they belong to.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path


def line_at(library: Path, address: int) -> int:
    """The line that the instruction before `address` comes from; 0 if unknown."""
    best = (0, 0)
    for sequence in _sequences(_section(library.read_bytes(), ".debug_line")):
        for (start, line), (end, _) in itertools.pairwise(sequence):
            if start <= address - 1 < end and start >= best[0]:
                best = (start, line)
    return best[1]


def _section(elf: bytes, wanted: str) -> bytes:
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)

    def header(i: int) -> tuple[int, int, int]:
        name, _, _, _, offset, length = struct.unpack_from("<IIQQQQ", elf, table + i * size)
        return name, offset, length

    _, names, _ = header(names_index)
    for i in range(count):
        name, offset, length = header(i)
        if elf[names + name : elf.index(b"\0", names + name)].decode() == wanted:
            return elf[offset : offset + length]
    return b""


class _Reader:
    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def fixed(self, code: str) -> int:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return int(value)

    def unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self.fixed("B")
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def signed(self) -> int:
        start = self.at
        value = self.unsigned()
        bits = 7 * (self.at - start)
        return value - (1 << bits) if value >> (bits - 1) else value


def _sequences(data: bytes) -> Iterator[list[tuple[int, int]]]:
    """Lists of (address, line), each ascending and ended by a last address."""
    at = 0
    while at < len(data):
        unit = _Reader(data, at)
        at = unit.fixed("I") + unit.at
        version = unit.fixed("H")
        if version != 4:
            raise ValueError(f"expected a line table of DWARF 4, found {version}")
        program = unit.fixed("I") + unit.at
        unit.fixed("B"), unit.fixed("B"), unit.fixed("B")  # instruction length, operations, is_stmt
        base, span, opcodes = unit.fixed("b"), unit.fixed("B"), unit.fixed("B")
        lengths = [unit.fixed("B") for _ in range(opcodes - 1)]
        yield from _run(_Reader(data, program), at, base, span, lengths)


def _run(code: _Reader, end: int, base: int, span: int, lengths: list[int]) -> Iterator[list[tuple[int, int]]]:
    address, line, rows = 0, 1, []
    while code.at < end:
        op = code.fixed("B")
        if op > len(lengths):  # special: moves both and adds a row
            step = op - len(lengths) - 1
            address, line = address + step // span, line + base + step % span
            rows.append((address, line))
        elif op == 0:  # extended
            length = code.unsigned()
            after, extended = code.at + length, code.fixed("B")
            if extended == 2:
                address = code.fixed("Q")
            elif extended == 1:
                yield [*rows, (address, line)]
                address, line, rows = 0, 1, []
            code.at = after
        elif op == 1:
            rows.append((address, line))
        elif op == 2:
            address += code.unsigned()
        elif op == 3:
            line += code.signed()
        elif op == 8:
            address += (255 - len(lengths) - 1) // span
        elif op == 9:
            address += code.fixed("H")
        else:
            for _ in range(lengths[op - 1]):
                code.unsigned()
