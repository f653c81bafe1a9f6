"""The objectives at work: state, step, loop."""
