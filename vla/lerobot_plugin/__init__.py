"""lerobot_plugin."""
