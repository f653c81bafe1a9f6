"""Programs made of the rooms above."""
