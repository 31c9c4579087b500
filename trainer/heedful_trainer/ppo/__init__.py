"""PPO-ptx, InstructGPT's own method, against rollouts that the running server draws."""
