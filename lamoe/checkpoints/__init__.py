"""Model files: read and write Hugging Face folders, convert GGUF files.

hf.py maps tensor names, shards.py reads and writes safetensors files, gguf.py converts a GGUF file
(gguf_file.py parses it)
to a folder, atomic.py replaces files and folders as a whole.
"""

from lamoe.checkpoints.hf import load, read_config, resolve, save

__all__ = ["load", "read_config", "resolve", "save"]
