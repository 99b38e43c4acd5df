"""Hugging Face model folders in and out, GGUF files in. hf.py knows names, shards.py knows bytes, gguf.py makes a folder of a GGUF file."""

from lamoe.checkpoints.hf import load, read_config, resolve, save

__all__ = ["load", "read_config", "resolve", "save"]
