"""The SO101: Feetech packets and registers, and the loop that owns its serial bus."""
