"""Build lamoe/corpus/austen.tar.xz: six novels by Jane Austen (public domain), one file each.

    apt-get download r-cran-janeaustenr && python tools/build_prose.py r-cran-janeaustenr_*.deb

The Debian package is an R library. Its novels are string vectors in R's binary serialisation, one
string per hard-wrapped line of about 70 columns. This script reads them without R, joins the lines
of each paragraph, and writes a reproducible archive (times, owners and order are fixed). The result
is committed. Nothing in lamoe needs this script or the package.
"""

from __future__ import annotations

import argparse
import io
import itertools
import lzma
import re
import struct
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "lamoe" / "corpus" / "austen.tar.xz"
TITLES = (
    "emma",
    "mansfield-park",
    "northanger-abbey",
    "persuasion",
    "pride-and-prejudice",
    "sense-and-sensibility",
)  # in the order of the package
# A modern publisher's note at the end of Northanger Abbey. It is left out, because it is not by
# the author.
MODERN_NOTE = "\n\nA NOTE ON THE TEXT\n\n"
# Prose is wrapped at about 70 columns. A line below this length inside a paragraph was broken on
# purpose, as in verse.
SHORT = 55


def string_vectors(rdb: bytes):
    """Yield the character vectors of an R lazy-load database.

    Its records are [big-endian u32 raw size][zlib stream].
    """
    at = 0
    while at < len(rdb):
        stream = zlib.decompressobj()
        raw = stream.decompress(rdb[at + 4 :])
        (size,) = struct.unpack_from(">I", rdb, at)
        if len(raw) != size:
            raise ValueError(
                f"record at byte {at} says {size} bytes and holds {len(raw)}: "
                "not an R lazy-load database"
            )
        yield read_strings(raw)
        at = len(rdb) - len(stream.unused_data)


def read_strings(raw: bytes) -> list[str]:
    """Parse R's XDR serialisation, version 3, of one STRSXP (type 16).

    Each element is flags (low byte 9), an i32 length, and the bytes.
    """
    if raw[:6] != b"X\n\x00\x00\x00\x03":
        raise ValueError(f"expected R serialisation version 3 in XDR form, found {raw[:6]!r}")
    at = 14  # skip magic, format version, and the R versions that wrote the file and can read it
    (name_length,) = struct.unpack_from(">i", raw, at)
    at += 4 + name_length  # skip the name of the encoding
    kind, count = struct.unpack_from(">Ii", raw, at)
    if kind & 0xFF != 16:
        raise ValueError(f"expected a character vector (type 16), found type {kind & 0xFF}")
    at += 8
    lines = []
    for _ in range(count):
        flags, length = struct.unpack_from(">Ii", raw, at)
        if flags & 0xFF != 9 or length < 0:
            raise ValueError(
                f"expected a string at byte {at}, found type {flags & 0xFF} of length {length}"
            )
        lines.append(raw[at + 8 : at + 8 + length].decode("utf-8"))
        at += 8 + length
    return lines


def reflow(lines: list[str]) -> str:
    """Put each paragraph on one line, with blank lines between them.

    Verse, addresses and signatures keep their line breaks.
    """
    paragraphs = re.split(r"\n(?:[ \t]*\n)+", "\n".join(lines).strip())
    return (
        "\n\n".join(
            join_lines([re.sub(r"[ \t]+", " ", line.strip()) for line in p.split("\n")])
            for p in paragraphs
        )
        + "\n"
    )


def join_lines(lines: list[str]) -> str:
    """Join the lines of one paragraph.

    In verse and addresses every line starts with a capital. Any other line marks prose.
    """
    is_prose = any(line[:1].islower() for line in lines[1:])
    out = lines[0]
    for before, line in itertools.pairwise(lines):
        out += (" " if is_prose or len(before) >= SHORT else "\n") + line
    return out


def archive(texts: dict[str, str]) -> bytes:
    """Return a .tar.xz whose bytes depend only on the texts."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, text in sorted(texts.items()):
            data = text.encode("utf-8")
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    return lzma.compress(plain.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "deb", type=Path, help="r-cran-janeaustenr_*.deb, as `apt-get download` leaves it"
    )
    parser.add_argument("--out", type=Path, default=TARGET)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", args.deb, folder], check=True)
        rdb = Path(folder, "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    novels = list(string_vectors(rdb))
    if len(novels) != len(TITLES):
        raise ValueError(
            f"{args.deb} holds {len(novels)} texts, expected the {len(TITLES)} novels "
            f"{', '.join(TITLES)}"
        )
    texts = {
        f"{title}.txt": reflow(lines).split(MODERN_NOTE)[0].rstrip() + "\n"
        for title, lines in zip(TITLES, novels)
    }
    packed = archive(texts)
    args.out.write_bytes(packed)
    for name, text in texts.items():
        print(f"{name:28} {len(text.encode()):>9,} bytes  {text[:40]!r}")
    print(f"{args.out}: {len(packed):,} bytes")


if __name__ == "__main__":
    main()
