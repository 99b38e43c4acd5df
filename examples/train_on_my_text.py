"""Train a small model on your own text: files, folders, globs or .jsonl.

python examples/train_on_my_text.py notes/ [--run.steps 200 --run.out runs/notes ...]

Further arguments override values of recipes/tiny.toml.
"""

import sys
from pathlib import Path

import lamoe
from lamoe.train import loop
from lamoe.train.recipe import Recipe

if not sys.argv[1:]:
    sys.exit("usage: train_on_my_text.py TEXT [--section.key VALUE ...]")
recipe_file = Path(__file__).parent.parent / "recipes" / "tiny.toml"
text, *overrides = sys.argv[1:]
recipe = Recipe.load(
    recipe_file,
    ["--data.sources", text, "--run.out", "runs/my-text", "--run.steps", "200", *overrides],
)

# Train the tokenizer and the model. 2 % of the files are held out to measure the loss on them.
checkpoint = loop.train(recipe)
print(f"the model is in {checkpoint / 'model'}; report: lamoe evaluate {recipe.run.out}")

llm = lamoe.LLM(checkpoint / "model")
(output,) = llm.generate(["The "], lamoe.SamplingParams(temperature=0.7, max_tokens=32, seed=1))
print(f"The {output.text}")
