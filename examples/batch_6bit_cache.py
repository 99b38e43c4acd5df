"""Generate for many prompts at once, with the latent cache stored in 6 bits per element.

python examples/batch_6bit_cache.py [MODEL_FOLDER]
"""

import sys
from pathlib import Path

import lamoe

newest = max(Path("runs").glob("*/step-*/model"), key=lambda p: p.stat().st_mtime, default=None)
folder = sys.argv[1] if sys.argv[1:] else newest or sys.exit("no run yet: give a model folder")

# The cache can be fp32, bf16, int8, 6bit or 4bit. Up to max_num_seqs sequences run at once.
llm = lamoe.LLM(folder, cache="6bit", max_num_seqs=16)
print(llm.plan().describe())  # bytes of weights and cache, and how many tokens fit

prompts = [f"def {name}(self" for name in ("read", "write", "close", "seek", "flush", "tell")]
outputs = llm.generate(prompts, lamoe.SamplingParams(temperature=0.0, max_tokens=24))

for prompt, output in zip(prompts, outputs):  # outputs have the order of the prompts
    first_line = (prompt + output.text).splitlines()[0]
    print(f"{first_line}    [{output.finish_reason}]")
