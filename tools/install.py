#!/usr/bin/env python3
"""Install lamoe into a virtual environment, and report the progress.

    python tools/install.py .venv serve,train              # what `make demo` runs
    python tools/install.py .venv serve,train,test,dev     # what `make test` and `make lint` run

Downloads are pinned by constraints.txt. Everything that pip and the compiler print is kept in
install.log inside the environment. Variables:

    LAMOE_TORCH   cpu (default) or cuda. On Linux the default index has CUDA builds of torch only,
                  several GB with their libraries, so `cpu` asks PyTorch's own index first.
    TORCH_INDEX   another index for torch: a mirror, or one for a specific CUDA version.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(
        "lamoe needs Python 3.11 or newer, found "
        + sys.version.split()[0]
        + "; run make with PYTHON=python3.11 or newer"
    )

import os
import platform
import queue
import re
import ssl
import subprocess
import threading
import time
import tomllib
import urllib.error
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # no other file contains this address
REACH_TIMEOUT_S = 5
BETWEEN_LINES_S = 3  # shortest time between two lines of progress, except for new stages
HEARTBEAT_S = 8  # longest time without a line of output

START = time.monotonic()


def say(text: str):
    print(f"[{time.monotonic() - START:4.0f} s] {text}", flush=True)


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def requirements(extras: list[str]) -> list[str]:
    """Return what pyproject.toml asks for: the package, the extras and the build."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    optional = project["project"]["optional-dependencies"]
    if unknown := [e for e in extras if e not in optional]:
        sys.exit(f"unknown extras {', '.join(unknown)}; pyproject.toml has {', '.join(optional)}")
    # cmake and ninja come from wheels, so the machine needs only a C++ compiler.
    out = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    out += ["cmake", "ninja"]
    for extra in extras:
        out += optional[extra]
    return list(dict.fromkeys(out))


def unreachable(url: str) -> str:
    """Return why `url` does not answer within a few seconds, or "" if it does."""
    certificates = os.environ.get("PIP_CERT") or os.environ.get("REQUESTS_CA_BUNDLE")
    try:
        context = ssl.create_default_context(cafile=certificates)
        urllib.request.urlopen(url, timeout=REACH_TIMEOUT_S, context=context).close()
    except urllib.error.HTTPError as e:
        return f"HTTP {e.code}"
    except (OSError, ValueError) as e:
        return str(getattr(e, "reason", e))
    return ""


def torch_index(folder: Path) -> list[str]:
    """Return the options of pip that select the index for torch."""
    if installed := next(folder.glob("**/site-packages/torch-*.dist-info"), None):
        if os.environ.get("LAMOE_TORCH") or os.environ.get("TORCH_INDEX"):
            say(f"{installed.stem} stays; to choose another one, run `make clean` first")
        return []
    choice = os.environ.get("LAMOE_TORCH") or "cpu"
    if choice not in ("cpu", "cuda"):
        sys.exit(f"LAMOE_TORCH={choice} is unknown; use cpu or cuda")
    index = os.environ.get("TORCH_INDEX")
    if not index:
        # macOS and Windows builds on the default index have no CUDA libraries
        if choice == "cuda" or platform.system() != "Linux":
            return []
        index = CPU_INDEX
    if why := unreachable(index.rstrip("/") + "/torch/"):
        say(f"{index} cannot be reached ({why})")
        say("torch comes from pip's default index: on Linux that may bring several GB of CUDA")
        say("to choose another index for torch, set TORCH_INDEX=URL")
        return []
    say(f"torch: from {index}" + ("" if choice == "cuda" else "; LAMOE_TORCH=cuda for NVIDIA GPUs"))
    return ["--extra-index-url", index]


def stage_of(line: str) -> tuple[str, bool] | None:
    """Translate a line of output into (progress text, whether a new stage begins)."""
    if m := re.match(r"\s*Downloading (\S+?)-(\d\S*?)-\S*\.whl\S*( \(.*\))?", line):
        return f"downloading {m[1]} {m[2]}{m[3] or ''}", False
    if m := re.match(r"\s*(?:Collecting|Processing) (\S+)", line):
        return f"resolving {re.sub(r'-.*whl$', '', Path(m[1]).name)}", False
    if m := re.match(r"Installing collected packages: (.*)", line):
        names = m[1].split(", ")
        return f"installing {len(names)} packages" if names[1:] else f"installing {names[0]}", True
    if "Configuring CMake" in line or "Running cmake" in line:
        return "configuring the compiled kernels", True
    if m := re.match(r"\s*\[(\d+)/(\d+)\] (?:Building|Linking)", line):
        return f"compiling kernels: {m[1]} of {m[2]} files", m[1] == m[2]
    return None


def watch(command: list[str], what: str, log_path: Path):
    """Run a command and print a line at least every few seconds.

    Its output is appended to `log_path`. If it fails, the end of the output is printed and the
    program ends.
    """
    with log_path.open("a", encoding="utf-8") as log:
        code = _watch(command, what, log)
    if code:
        tail = log_path.read_text(encoding="utf-8").splitlines()[-30:]
        print("\n".join(tail), file=sys.stderr)
        sys.exit(f"{what} failed with exit code {code}; all output: {log_path}")


def _watch(command: list[str], what: str, log) -> int:
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    say(what)
    current, since = what, time.monotonic()
    said = since
    while True:
        try:
            line = lines.get(timeout=1)
        except queue.Empty:
            line = ""
        if line is None:
            return process.wait()
        log.write(line)
        now = time.monotonic()
        if line and (found := stage_of(line)) and found[0] != current:
            current, since = found[0], now
            if found[1] or now - said >= BETWEEN_LINES_S:
                say(current)
                said = now
        elif now - said >= HEARTBEAT_S:
            say(f"{current}, for {now - since:.0f} s")
            said = now


def install(folder: Path, extras: list[str]):
    # an interrupted call may have left an environment without pip
    if not any(folder.glob("**/site-packages/pip")):
        say(f"creating {folder} with Python {platform.python_version()}")
        venv.create(folder, with_pip=True)
    log_path = folder / "install.log"
    log_path.write_text("", encoding="utf-8")
    pip = [str(python_of(folder)), "-m", "pip", "install", "--progress-bar", "off"]
    pinned = ["-c", str(ROOT / "constraints.txt"), *torch_index(folder)]
    watch([*pip, *pinned, *requirements(extras)], "finding packages", log_path)
    package = f".[{','.join(extras)}]" if extras else "."
    build = ["-v", "--no-build-isolation", "--no-deps", "-e", package]
    watch([*pip, *build], "building lamoe", log_path)
    if not any(folder.glob("**/site-packages/lamoe/_native*")):
        say(f"the C++ kernels could not be compiled (see {log_path}): lamoe runs on torch, slower")
    say(f"{folder} is ready")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python tools/install.py FOLDER [EXTRA,EXTRA,...]")
    wanted = sys.argv[2].split(",") if len(sys.argv) == 3 and sys.argv[2] else []
    install(Path(sys.argv[1]), wanted)
