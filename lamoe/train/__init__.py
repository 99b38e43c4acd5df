"""Training: text sources, packing and sampling, recipe, optimizer, loop, checkpoints.

Start with loop.py.
"""
