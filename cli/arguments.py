"""Types of command line options: functions for argparse, which shows what they raise."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def above_zero(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def seed(text: str) -> int:
    """A seed of ComfyUI's."""
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2^64 - 1")
    return int(text)


def size(text: str) -> tuple[int, int]:
    """(width, height) of a picture in pixels."""
    width, _, height = text.lower().partition("x")
    if not all(side.isdecimal() and int(side) and not int(side) % 16 for side in (width, height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in multiples of 16, as 1024x768")
    return int(width), int(height)
