"""LoRA experts: storage, merging and task masks."""
