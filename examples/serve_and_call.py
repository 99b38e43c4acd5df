"""Start `lamoe serve`, call it with OpenAI's client, and stop it.

python examples/serve_and_call.py [MODEL_FOLDER]        needs: pip install openai
"""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from openai import OpenAI

newest = max(Path("runs").glob("*/step-*/model"), key=lambda p: p.stat().st_mtime, default=None)
folder = sys.argv[1] if sys.argv[1:] else newest or sys.exit("no run yet: give a model folder")
port = sys.argv[2] if sys.argv[2:] else "8123"

command = [sys.executable, "-m", "lamoe", "serve", str(folder), "--port", port]
# The log goes to stderr as JSON lines.
server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
try:
    url = f"http://127.0.0.1:{port}"
    while server.poll() is None:  # /health answers 503 while the model loads
        try:
            urllib.request.urlopen(f"{url}/health")
            break
        except urllib.error.URLError:
            time.sleep(0.2)

    client = OpenAI(base_url=f"{url}/v1", api_key="not needed")
    model = client.models.list().data[0].id
    options = dict(model=model, prompt="def main(", max_tokens=32, temperature=0.7, seed=1)
    for event in client.completions.create(**options, stream=True):
        print(event.choices[0].text, end="", flush=True)
    print()
finally:
    server.terminate()  # sends SIGTERM, after which running requests still finish
    server.wait()
