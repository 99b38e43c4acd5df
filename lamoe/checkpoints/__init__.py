"""Model files: read and write Hugging Face folders, convert GGUF files.

hf.py maps tensor names, shards.py reads and writes safetensors files, gguf.py converts a GGUF file
to a folder, foreign.py recognises what is neither, atomic.py replaces files and folders as a whole.
"""

from lamoe.checkpoints.hf import load, read_config, resolve, save

__all__ = ["load", "read_config", "resolve", "save"]
