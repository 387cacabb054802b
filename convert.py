"""Conversion of checkpoints, run from a checkout. This version has none, and needs none to run the model."""

import sys

if __name__ == "__main__":
    sys.exit(
        "convert.py: conversion is not available yet in this version of mlx-v4flash; the official checkpoint works "
        "as it is: mlx-v4flash generate PROMPT --model FOLDER"
    )
