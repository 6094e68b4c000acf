"""LoRA experts: storage, banks, merging, task masks and task routers."""
