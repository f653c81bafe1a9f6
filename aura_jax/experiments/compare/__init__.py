"""Systems side by side: each (system, seed) trained, scored and timed once, on the same data."""
