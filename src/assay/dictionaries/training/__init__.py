"""Training dictionaries: the state, the step, what is done about dead latents, checkpoints, and the loop."""
