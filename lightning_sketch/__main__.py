"""Lets `python -m lightning_sketch` do what the command `lightning-sketch` does."""

from lightning_sketch.cli import main

main()
