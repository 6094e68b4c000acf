"""Merging methods, one file each, and their registry."""
