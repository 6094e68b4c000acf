"""The policy: LeRobot's three faces, and the CogVLA network behind them."""
