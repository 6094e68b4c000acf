"""The verbs of `vla robot`, one file each."""
