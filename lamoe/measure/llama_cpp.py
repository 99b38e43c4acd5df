"""Measures llama.cpp for `lamoe bench --peer`, with its own tools in interleaved runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lamoe.measure.timing import Bench, Line, measure

TOOLS = ("llama-bench", "llama-batched-bench")
Say = Callable[[str], None]
Rates = dict[tuple[int, int, int], list[float]]


class Peer:
    """llama.cpp's benchmark tools on a GGUF file.

    Raises:
        ValueError: if a tool is not on PATH, or the file does not exist.
    """

    def __init__(self, model: str, threads: int):
        self.model, self.threads = model, threads
        for tool in TOOLS:
            if shutil.which(tool) is None:
                raise ValueError(
                    f"{tool} is not on PATH; build llama.cpp and put its bin folder there, or omit "
                    "--peer"
                )
        if not Path(model).is_file():
            raise ValueError(
                f"--peer-model {model!r} is not a file; give the GGUF file that llama.cpp should "
                "run"
            )

    def command(self, lines: list[Line]) -> list[str]:
        """Return the command for all lines of one depth, or for one line of several sequences.

        llama-bench first fills its cache up to the depth. One command for all lines does this only
        once.
        """
        first = lines[0]
        base = ["-m", self.model, "-t", str(self.threads), "-fa"]
        if first.sequences > 1:
            return [
                *("llama-batched-bench", *base, "on"),
                *("-npp", str(first.depth), "-ntg", "16"),
                *("-npl", f"{first.sequences},{first.sequences}"),  # twice, for two measurements
                *("-c", str((first.depth + 24) * first.sequences)),
                *("--output-format", "jsonl"),
            ]
        prompts = [str(x.new) for x in lines if x.new > 1]
        decode = "32" if len(prompts) < len(lines) else "0"
        return [
            *("llama-bench", *base, "1", "-r", "2"),
            *("-d", str(first.depth), "-p", ",".join(prompts) or "0", "-n", decode),
            *("-o", "jsonl", "--progress"),
        ]

    def measure(self, lines: list[Line], say: Say) -> None:
        """Run the command of these lines and add its tokens/s to each of them.

        Raises:
            ValueError: if the command failed. The message quotes the end of its output.
        """
        command = self.command(lines)
        code, printed, errors = _run(command, say)
        found = parse(printed)
        for line in lines:
            rates = found.get((line.new, line.depth, line.sequences))
            if code or not rates:
                why = "said: " + " ".join(errors) if code else f"no figure for {line.name}"
                raise ValueError(f"{' '.join(command)} ended with code {code} and {why}")
            line.peer += rates


def _run(command: list[str], say: Say) -> tuple[int, str, list[str]]:
    """Run a command and return (exit code, standard output, last lines of standard error)."""
    with (
        tempfile.TemporaryFile("w+") as out,
        subprocess.Popen(
            command, stdout=out, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as process,
    ):
        try:
            assert process.stderr is not None
            errors = _follow(process.stderr, say)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        out.seek(0)
        return code, out.read(), errors


def _follow(stream: IO[str], say: Say) -> list[str]:
    """Pass progress lines on to `say` and return the last ten lines."""
    last = [""]
    for text in stream:
        last = [*last[-9:], text.strip()]
        if text.startswith("llama-bench: "):
            say(f"llama.cpp: {text.removeprefix('llama-bench: ').strip()}")
    return last


def parse(text: str) -> Rates:
    """Parse the JSON lines of either tool to {(new tokens, depth, sequences): [tokens/s, ...]}.

    A decode measurement has the key (1, depth, sequences).
    """
    found: Rates = {}
    for row in (json.loads(line) for line in text.splitlines() if line.startswith("{")):
        if "speed_tg" in row:
            found.setdefault((1, row["pp"], row["pl"]), []).append(row["speed_tg"])
        else:
            key = (row["n_prompt"] or 1, row["n_depth"], 1)
            found.setdefault(key, []).extend(row["samples_ts"])
    return found


def measure_interleaved(
    bench: Bench,
    peer: Peer,
    lines: list[Line],
    rounds: int,
    probe: Callable[[], float],
    say: Say,
) -> None:
    """Measure lamoe, then the peer, then lamoe again; call `probe` before, between and after them.

    Lines of one depth are measured together, because each command of the peer fills its cache.
    """
    groups: dict[object, list[Line]] = {}
    for x in lines:
        groups.setdefault(x.depth if x.depth and x.sequences == 1 else x.name, []).append(x)
    for group in groups.values():
        probes = [probe()]
        measure(bench, group, rounds, say)
        probes.append(probe())
        say(f"llama.cpp: {', '.join(x.name for x in group)}{_fill_note(group[0])}")
        peer.measure(group, say)
        probes.append(probe())
        measure(bench, group, rounds, say)
        probes.append(probe())
        for x in group:
            x.read = probes
            say(
                f"{x.name}: lamoe {x.rate:,.1f}, llama.cpp {x.peer_rate:,.1f} tokens/s, "
                f"{x.ratio:.2f} x"
            )


def _fill_note(line: Line) -> str:
    return f" (it fills {line.depth:,} tokens first)" if line.sequences == 1 and line.depth else ""
