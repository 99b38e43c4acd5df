"""Load a model and compute the log-probability of each token of a text.

python examples/load_and_score.py [MODEL_FOLDER]
"""

import math
import sys
from pathlib import Path

import torch

import lamoe

newest = max(Path("runs").glob("*/step-*/model"), key=lambda p: p.stat().st_mtime, default=None)
folder = sys.argv[1] if sys.argv[1:] else newest or sys.exit("no run yet: give a model folder")

text = "def read(self, path):\n    return open(path).read()\n"
model = lamoe.load(folder)  # a torch module in eval mode, float32 or the checkpoint's own dtype
tokenizer = lamoe.Tokenizer.load(folder)

ids = torch.tensor([tokenizer.encode(text, bos=True)])  # token ids [1, T]
with torch.inference_mode():
    logits = model(ids)  # [1, T, vocabulary]

# Position i predicts token i + 1, so drop the last row of logits and the first token.
logprobs = logits[0, :-1].float().log_softmax(-1)
logprobs = logprobs.gather(-1, ids[0, 1:, None])[:, 0]

for token, logprob in zip(ids[0, 1:].tolist(), logprobs.tolist()):
    print(f"{logprob:8.3f}  {tokenizer.decode([token])!r}")
bits = -logprobs.sum().item() / math.log(2)
print(f"{len(logprobs)} tokens, {bits / len(text.encode()):.3f} bits per byte")
