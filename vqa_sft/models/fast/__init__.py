"""Every exact speed-up: packing, attention, vision tower, fused adapters, compilation, features on disk.

Each gives the numbers of the library's own path, and each module can be deleted alone.
Import from here: `speedups`, `feature_store`.
"""
