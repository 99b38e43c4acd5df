"""Measure how fast text is packed: MB of text per second of CPU time, and peak memory.

The text recombines paragraphs of the built-in sources, so it has no more different words than they
have. `--text` measures files of your own. CPU time is used because it hardly depends on other
programs; with one thread it is the time on an idle core.

    python benchmarks/packing.py --mb 100
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core

from lamoe.text import tokenizer as tokenizers
from lamoe.text.tokenizer import Tokenizer
from lamoe.train import data
from lamoe.train.fast_encode import CachedEncoder
from lamoe.train.sources import read_documents

VOCAB_SIZE = 4096  # of the preset tiny


def write_text(path: Path, size: int) -> None:
    """Write about `size` bytes of text in records, compressed as the name says."""
    rng, total, number = random.Random(0), 0, 0
    paragraphs = [
        p for d in read_documents(["stdlib", "austen"]) for p in d.text.split("\n\n") if p
    ]
    records = []
    opener = gzip.open if path.suffix == ".gz" else open
    if path.suffix == ".zst":
        from backports import zstd

        opener = zstd.open
    file = None if path.suffix == ".parquet" else opener(path, "wt", encoding="utf-8")
    while total < size:
        text = "\n\n".join(rng.choices(paragraphs, k=rng.randint(4, 40)))
        if file:
            file.write(json.dumps({"text": f"{number}\n{text}"}) + "\n")
        else:
            records.append(f"{number}\n{text}")
        total, number = total + len(text.encode()), number + 1
    if file:
        file.close()
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": records}), path, row_group_size=10_000)


def prepare_tokenizer(source: str, folder: Path) -> None:
    """Train a tokenizer on a sample, and measure the tokenizers library on it."""
    sample, size = [], 0
    for document in read_documents([source]):
        sample.append(document.text)
        size += document.size
        if size > 8e6:
            break
    tokenizer = tokenizers.train(sample, VOCAB_SIZE)
    with Cpu() as library:
        tokenizer.encode_batch(sample)
    show("the tokenizers library, 8 MB", size, library.seconds)
    tokenizer.save(folder)


def in_child(function, *args) -> None:
    """Call a function in a child process, so that its memory is no part of the measurement."""
    if not (pid := os.fork()):
        function(*args)
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the child process failed")


class Cpu:
    """Measures the CPU seconds of a block."""

    def __enter__(self):
        self.start = time.process_time()
        return self

    def __exit__(self, *exception):
        self.seconds = time.process_time() - self.start


def show(what: str, size: int, seconds: float) -> None:
    print(f"{what:<44} {size / 1e6 / seconds:8.1f} MB/s   {seconds / size * 1e9:7.1f} s per GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mb", type=float, default=100, help="MB of text to generate")
    parser.add_argument(
        "--format", default="jsonl", choices=["jsonl", "jsonl.gz", "jsonl.zst", "parquet"]
    )
    parser.add_argument("--text", help="source to pack instead of generated text")
    args = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="packing-"))
    try:
        source = args.text or str(folder / f"text.{args.format}")
        if not args.text:
            in_child(write_text, Path(source), int(args.mb * 1e6))
        in_child(prepare_tokenizer, source, folder / "tokenizer")
        size = num_documents = 0
        with Cpu() as reading:
            for document in read_documents([source]):
                size, num_documents = size + document.size, num_documents + 1
        print(f"{num_documents:,} documents, {size / 1e6:.1f} MB")
        show("reading once", size, reading.seconds)
        tokenizer = Tokenizer.load(folder / "tokenizer")
        encoder, encoding = CachedEncoder(tokenizer), 0.0

        def timed(texts):
            nonlocal encoding
            with Cpu() as cpu:
                rows = encoder.encode_batch(texts)
            encoding += cpu.seconds
            return rows

        digest = hashlib.sha256(tokenizer.inner.to_str().encode()).hexdigest()
        with Cpu() as packing:
            corpus = data.prepare(
                [source],
                timed,
                tokenizer.bos_id,
                tokenizer.eos_id,
                tokenizer.vocab_size,
                digest,
                folder / "packed",
            )
        show("packing, of which", size, packing.seconds)
        show("    encoding", size, encoding)
        show("    reading twice, holding out, writing", size, packing.seconds - encoding)
        tally = corpus.meta["sources"][0]
        print(f"{tally['tokens']:,} tokens, {tally['bytes'] / tally['tokens']:.2f} bytes a token")
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
