"""The model from its configuration up: read transformer.py first."""
