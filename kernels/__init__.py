"""Fused operations, one file each: formula, fp64 reference, torch path, Triton path, custom op, dispatch."""
