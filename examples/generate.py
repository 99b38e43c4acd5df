"""Generate text and print it while it is generated.

python examples/generate.py [MODEL_FOLDER]
"""

import sys
from pathlib import Path

import lamoe

newest = max(Path("runs").glob("*/step-*/model"), key=lambda p: p.stat().st_mtime, default=None)
folder = sys.argv[1] if sys.argv[1:] else newest or sys.exit("no run yet: give a model folder")

llm = lamoe.LLM(folder)
prompt = "class Node:"
# The same seed gives the same text, also if the engine runs other requests at the time.
params = lamoe.SamplingParams(temperature=0.7, top_p=0.95, max_tokens=64, seed=1)

print(prompt, end="", flush=True)
# The stream gives one delta per token. Leaving the loop cancels the request.
for delta in llm.stream(prompt, params):
    print(delta.text, end="", flush=True)
print()

output = delta.output  # only the last delta has an output
print(f"[{len(output.token_ids)} tokens, finish reason: {output.finish_reason}]")
