"""CogMerge: instruction-driven routing and mergeable experts for vision-language-action policies."""

__version__ = "0.1.0"
