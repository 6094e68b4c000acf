"""The policy at run time: when to ask it, and how to answer fast."""
