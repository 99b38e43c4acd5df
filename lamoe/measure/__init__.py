"""Measuring a model and the machine: quality, speed, health."""
