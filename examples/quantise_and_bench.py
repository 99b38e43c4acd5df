"""Quantise a model to 4 bits, then compare speed and memory with the original.

python examples/quantise_and_bench.py [MODEL_FOLDER]
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lamoe

newest = max(Path("runs").glob("*/step-*/model"), key=lambda p: p.stat().st_mtime, default=None)
folder = sys.argv[1] if sys.argv[1:] else newest or sys.exit("no run yet: give a model folder")


def tokens_per_second(llm: lamoe.LLM, sequences: int) -> float:
    # With ignore_eos, every sequence generates exactly max_tokens tokens.
    params = lamoe.SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate(["def main("] * sequences, params)
    return sum(len(o.token_ids) for o in outputs) / (time.perf_counter() - start)


with tempfile.TemporaryDirectory() as scratch:
    packed = Path(scratch) / "int4"
    # Add `--calibrate TEXT` for real models: it reduces the error of 4 bits by a factor of 2 to 4.
    quantise = ["quantize", str(folder), str(packed), "--weights", "int4"]
    subprocess.run([sys.executable, "-m", "lamoe", *quantise], check=True)
    for name, path in (("original", folder), ("int4", packed)):
        llm = lamoe.LLM(path, speculate=0)  # without drafts, to measure plain decoding
        tokens_per_second(llm, 1)  # warm up
        one, eight = tokens_per_second(llm, 1), tokens_per_second(llm, 8)
        print(f"{name}: {one:.0f} tokens/s alone, {eight:.0f} tokens/s for 8 sequences")
        print(llm.plan().describe())
        del llm  # closes the memory-mapped int4 file before its folder is deleted
