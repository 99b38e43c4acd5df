"""Backends: what runs a model. base.py has the interface; `load` chooses and loads one."""

from lamoe.backends.load import load, prepare

__all__ = ["load", "prepare"]
