"""The suite `so101_tabletop`: an emulated SO101 picks up a cube and places it in a bowl."""
