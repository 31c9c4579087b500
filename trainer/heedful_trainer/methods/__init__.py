"""Methods that train a policy, and the one loop that they and the reward model share."""
