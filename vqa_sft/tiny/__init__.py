"""The `tiny` base: a Qwen2.5-VL of a few million parameters, trained on drawn pictures, loadable offline by path."""

from pathlib import Path

TINY_PATH = Path(__file__).parent / "base"
