"""action_decoders."""
