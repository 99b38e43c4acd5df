"""Hugging Face model folders in and out. hf.py knows names, shards.py knows bytes."""

from lamoe.convert.hf import load, read_config, resolve, save

__all__ = ["load", "read_config", "resolve", "save"]
