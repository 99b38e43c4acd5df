#!/usr/bin/env python3
"""Check what no formatter checks: line ends of every text file, the width of Markdown and TOML.

    python tools/check_text.py [FILE ...]     # default: all files that git tracks

Tables, code blocks and lines without a space (long links) may be wider than 100 columns.
"""

import re
import subprocess
import sys
from pathlib import Path

WIDTH = 100
WRAPPED = (".md", ".toml", ".txt", ".yml", ".yaml", "")
NOT_OURS = re.compile(r"vendor-|LICENSE|/corpus/")


def problems(path: Path) -> list[str]:
    """Return a list of messages about one file. For a binary file the list is empty."""
    data = path.read_bytes()
    if b"\0" in data or NOT_OURS.search(path.as_posix()):
        return []
    out = []
    if data and (not data.endswith(b"\n") or data.endswith(b"\n\n")):
        out.append(f"{path}: must end with exactly one newline")
    in_code = False
    for number, line in enumerate(data.decode("utf-8").split("\n"), 1):
        if line != line.rstrip():
            out.append(f"{path}:{number}: whitespace at the end of the line")
        if path.suffix in WRAPPED:
            in_code ^= line.lstrip().startswith("```")
            may_be_wide = in_code or line.lstrip().startswith("|") or " " not in line.strip("- ")
            if len(line) > WIDTH and not may_be_wide:
                out.append(f"{path}:{number}: {len(line)} columns, the limit is {WIDTH}")
    return out


def main(files: list[str]) -> int:
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True)
    paths = files or [f for f in listed.stdout.split("\0") if f]
    found = [p for f in paths if Path(f).is_file() for p in problems(Path(f))]
    print("\n".join(found) or f"{len(paths)} files: line ends and widths are in order")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
