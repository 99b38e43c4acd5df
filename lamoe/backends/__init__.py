"""Backends, which run models. base.py defines their interface. `load` chooses and loads one."""

from lamoe.backends.load import load, prepare

__all__ = ["load", "prepare"]
