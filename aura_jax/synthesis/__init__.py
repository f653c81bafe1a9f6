"""Speech from text, in many voices: to train on, and to test with."""
