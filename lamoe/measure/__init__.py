"""Measurements of a model and of the machine: quality, speed, health."""
