"""Parse the header of a GGUF file, of either byte order, and read its tensors.

The file may come from anyone. Every count, length and offset is compared with the size of the file
before anything is read or allocated, so a small file costs little time and memory. The `gguf`
package (extra `gguf`) supplies the table of tensor types and dequantises the blocks.

Source: the GGUF specification of the ggml project, versions 2 and 3.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lamoe.text.json_file import foreign_content

VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_NESTING = 3  # of arrays
# Limits beyond every known file, which bound the memory of the metadata. The largest vocabularies
# have 0.3 million tokens, in headers of 12 MB.
MAX_HEADER_BYTES = 256 * 2**20
MAX_VALUES = 8_000_000
MAX_KEYS, MAX_TENSORS = 10_000, 200_000
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "u1",
    1: "i1",
    2: "u2",
    3: "i2",
    4: "u4",
    5: "i4",
    6: "f4",
    7: "?",
    10: "u8",
    11: "i8",
    12: "f8",
}
# Tensor types whose every element is one number, so that swapping bytes is exact.
_PLAIN = {"F32": "f4", "F16": "f2", "F64": "f8"}


class Tensor(NamedTuple):
    """A tensor in a checked file.

    Attributes:
        kind: the type as gguf.GGMLQuantizationType.
        shape: rows first, as in torch.
        begin: offset of the data in the file, in bytes.
    """

    kind: Any
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


class File(NamedTuple):
    """A GGUF file whose header has been read.

    Attributes:
        metadata: {key: value}. Values are strings, numbers and lists of them.
        tensors: {tensor name: Tensor}.
        is_big_endian: whether numbers are stored with the high byte first.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    is_big_endian: bool = False

    def read(self, name: str) -> np.ndarray:
        """Return the tensor `name`, dequantised to float32.

        Raises:
            ValueError: if its type is not supported, or the file has changed meanwhile.
        """
        tensor = self.tensors[name]
        raw = np.fromfile(self.path, np.uint8, tensor.num_bytes, offset=tensor.begin)
        if raw.size != tensor.num_bytes:
            raise ValueError(f"{self.path} was truncated while it was read; download it again")
        if (element := _PLAIN.get(tensor.kind.name)) is not None:
            order = ">" if self.is_big_endian else "<"
            return raw.view(order + element).astype(np.float32).reshape(tensor.shape)
        if self.is_big_endian:
            raise ValueError(
                f"{self.path} is a big-endian file, and {name} is stored as {tensor.kind.name}: "
                "programs disagree about the byte order inside its blocks; lamoe reads "
                f"{', '.join(_PLAIN)} of such files. Get the little-endian file, or convert the "
                "file (gguf-convert-endian FILE little)"
            )
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
        rows = raw.reshape(*tensor.shape[:-1], tensor.shape[-1] // block * size)
        try:
            return np.asarray(gguf.quants.dequantize(rows, tensor.kind), dtype=np.float32)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: {name} is stored as {tensor.kind.name}, which the gguf package "
                "cannot dequantise; get the model in another type, for example Q8_0"
            ) from None


def read(path: str | Path) -> File:
    """Read the header of a GGUF file. No tensor data is read.

    Raises:
        ValueError: if the file is missing, or is not a complete GGUF file of a known version.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        import gguf  # noqa: F401
    except ImportError as e:
        raise ValueError(
            f"reading GGUF files needs a package that is not installed ({e.name}); "
            "pip install 'lamoe[gguf]'"
        ) from None
    with open(path, "rb") as file:
        try:
            return _Parser(path, file).parse()
        except _Broken as e:
            raise ValueError(
                f"{path} is not a complete GGUF file: {e}; download it again"
            ) from None


class _Broken(Exception):
    """The file breaks the format. The message says where."""


class _Parser:
    """Reads one header from front to end."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.left = min(self.size, MAX_HEADER_BYTES)  # bytes that the header may still have
        self.num_values = 0
        self.order = "<"

    def parse(self) -> File:
        self._read_version()
        num_tensors = self._count(32, "tensors", MAX_TENSORS)
        num_keys = self._count(13, "metadata keys", MAX_KEYS)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string("a metadata key")
            if key in metadata:
                raise _Broken(f"the metadata key {key[:100]!r} occurs twice")
            metadata[key] = self._value(self._integer("u4"), key[:100])
        described = self._describe_tensors(num_tensors)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise _Broken(
                f"general.alignment is {str(alignment)[:40]}; it must be a power of two, at least 8"
            )
        begin = -(-self.file.tell() // alignment) * alignment
        tensors = {
            name: self._place(name, kind, shape, begin, offset, alignment)
            for name, (kind, shape, offset) in described.items()
        }
        self._check_overlaps(tensors)
        return File(self.path, metadata, tensors, self.order == ">")

    def _read_version(self) -> None:
        magic = self._bytes(4, "the magic number")
        if magic != b"GGUF":
            what = foreign_content(magic + self.file.read(200))
            if magic[:2] == b"PK":
                what = "a zip archive; unpack it first"
            elif magic in (b"lmgg", b"tjgg", b"fmgg", b"algg"):  # GGML, GGJT, GGMF, GGLA
                what = "of the GGML format that came before GGUF; convert the model again"
            if what:
                raise ValueError(f"{self.path} is {what}")
            raise _Broken(f"it begins with {magic!r} and not with b'GGUF'")
        raw = self._bytes(4, "the version")
        if raw[:2] == b"\0\0" and raw[2:] != b"\0\0":  # versions are small: the high bytes are 0
            self.order = ">"
        version = int.from_bytes(raw, "big" if self.order == ">" else "little")
        if version not in VERSIONS:
            raise ValueError(
                f"{self.path} is a GGUF file of version {version}; lamoe reads the versions "
                f"{' and '.join(map(str, VERSIONS))}, so convert the model again with a current "
                "converter"
            )

    def _describe_tensors(self, count: int) -> dict[str, tuple[Any, tuple[int, ...], int]]:
        """Return {name: (type, shape, offset in the data)}."""
        import gguf

        described = {}
        for _ in range(count):
            name = self._string("a tensor name")
            if name in described:
                raise _Broken(f"the tensor {name[:100]!r} occurs twice")
            num_dims = self._integer("u4")
            if not 1 <= num_dims <= MAX_DIMS:
                raise _Broken(f"the tensor {name[:100]!r} has {num_dims:,} dimensions")
            shape = tuple(self._integer("u8") for _ in range(num_dims))[::-1]
            kind, offset = self._integer("u4"), self._integer("u8")
            if kind not in list(gguf.GGMLQuantizationType):
                raise _Broken(
                    f"the tensor {name[:100]!r} has the type {kind}, which the installed gguf "
                    "package does not know (a newer one may)"
                )
            described[name] = gguf.GGMLQuantizationType(kind), shape, offset
        return described

    def _place(
        self, name: str, kind: Any, shape: tuple[int, ...], begin: int, offset: int, alignment: int
    ) -> Tensor:
        import gguf

        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise _Broken(
                f"the rows of {name[:100]!r} have {shape[-1]:,} elements, which {kind.name} cannot "
                f"store in blocks of {block}"
            )
        num_bytes = math.prod(shape) // block * block_bytes
        if offset % alignment:
            raise _Broken(
                f"{name[:100]!r} begins at byte {offset:,} of the data, which is not aligned to "
                f"{alignment} bytes"
            )
        if begin + offset + num_bytes > self.size:
            raise _Broken(
                f"{name[:100]!r} ends at byte {begin + offset + num_bytes:,}, but the file has "
                f"{self.size:,} bytes; it is truncated"
            )
        return Tensor(kind, shape, begin + offset, num_bytes)

    def _check_overlaps(self, tensors: dict[str, Tensor]) -> None:
        end, before = 0, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
            if tensor.begin < end and tensor.num_bytes:
                raise _Broken(f"the tensors {before[:100]!r} and {name[:100]!r} overlap")
            if tensor.num_bytes:
                end, before = tensor.begin + tensor.num_bytes, name

    # ---- values ----
    def _bytes(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise _Broken(
                f"{what} needs {count:,} bytes, but {self.left:,} are left of the "
                + ("file" if self.size <= MAX_HEADER_BYTES else f"{MAX_HEADER_BYTES:,} of a header")
            )
        self.left -= count
        raw = self.file.read(count)
        if len(raw) != count:
            raise _Broken("the file was truncated while it was read")
        return raw

    def _integer(self, kind: str) -> int:
        raw = self._bytes(int(kind[1:]), "a number")
        return int.from_bytes(raw, "big" if self.order == ">" else "little")

    def _count(self, least_bytes: int, what: str, limit: int = MAX_VALUES) -> int:
        """Read a number of items. The file must hold at least `least_bytes` for each of them."""
        count = self._integer("u8")
        if count * least_bytes > self.left:
            raise _Broken(f"it promises {count:,} {what}, more than its {self.size:,} bytes hold")
        if count > limit:
            raise _Broken(f"it has {count:,} {what}; more than {limit:,} are refused")
        self.num_values += count
        if self.num_values > MAX_VALUES:
            raise _Broken(f"its header has more than {MAX_VALUES:,} values, which is refused")
        return count

    def _string(self, what: str) -> str:
        raw = self._bytes(self._integer("u8"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _Broken(f"{what} is not UTF-8 text") from None

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string(f"the value of {key!r}")
        if kind == _ARRAY:
            return self._array(key, depth)
        return self._numbers(kind, key, 1)[0]

    def _array(self, key: str, depth: int) -> list:
        if depth == MAX_NESTING:
            raise _Broken(f"the arrays of {key!r} are nested more than {MAX_NESTING} deep")
        kind = self._integer("u4")
        least = {_STRING: 8, _ARRAY: 12}.get(kind, 1)
        count = self._count(least, f"values of {key!r}")
        if kind in (_STRING, _ARRAY):
            return [self._value(kind, key, depth + 1) for _ in range(count)]
        return self._numbers(kind, key, count)

    def _numbers(self, kind: int, key: str, count: int) -> list:
        if kind not in _SCALARS:
            raise _Broken(f"the value of {key!r} has the type {kind}, which is not known")
        dtype = np.dtype(self.order + _SCALARS[kind])
        raw = self._bytes(count * dtype.itemsize, f"the value of {key!r}")
        if _SCALARS[kind] == "?" and max(raw, default=0) > 1:
            raise _Broken(f"the value of {key!r} is neither true nor false")
        values = np.frombuffer(raw, dtype).tolist()
        return [_shortest(v) for v in values] if _SCALARS[kind] == "f4" and count == 1 else values


def _shortest(value: float) -> float:
    """Convert a float32 number to the float of its shortest spelling: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))
