#!/usr/bin/env python3
"""Build a wheel, install it into a bare environment, and use it there as a stranger would.

    python tools/wheel_check.py [FOLDER]      # FOLDER: build/wheel-check if not given

The environment has the wheel and its run-time dependencies, nothing else, and the commands run
outside the checkout, so that nothing can be imported from it by accident. They are `lamoe doctor`
and two tokens from a tiny random model.
"""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from install import ROOT, python_of, say, torch_index, watch

MAKE_MODEL = """
import lamoe
from lamoe.text import tokenizer
tok = tokenizer.train(["def read(self): return None " * 9], 300)
config = lamoe.ModelConfig.preset("tiny").replace(vocab_size=300)
lamoe.save(lamoe.Transformer(config).init_weights(0).eval(), "model")
tok.save("model")
"""


def run(*command: object, cwd: Path):
    print("$", " ".join(map(str, command)), flush=True)
    # Without PYTHONPATH, the checkout is not importable.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([str(c) for c in command], cwd=cwd, env=env, check=True)


def main(folder: Path):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log_path = folder / "install.log"
    # Use a separate build folder, because that of .venv may contain bindings that only tests use.
    build = [f"--config-settings=build-dir={folder / 'cmake'}", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", *build, str(ROOT)]
    watch(command, "building the wheel", log_path)
    (wheel,) = folder.glob("lamoe-*.whl")
    say(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")

    say("creating a bare environment")
    venv.create(folder / "venv", with_pip=True)
    python = python_of(folder / "venv")
    options = ["--progress-bar", "off", "-c", str(ROOT / "constraints.txt")]
    options += torch_index(folder / "venv")
    command = [str(python), "-m", "pip", "install", *options, str(wheel)]
    watch(command, "installing the wheel and its dependencies", log_path)

    say("using it")
    lamoe = python.with_name("lamoe.exe" if os.name == "nt" else "lamoe")
    run(lamoe, "doctor", cwd=folder)
    (folder / "make_model.py").write_text(MAKE_MODEL, encoding="utf-8")
    run(python, "make_model.py", cwd=folder)
    run(lamoe, "generate", "--model", "model", "--prompt", "def", "--max-tokens", "2", cwd=folder)
    say("the wheel works")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "wheel-check").resolve())
