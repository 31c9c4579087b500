"""Model definition, weights and forward pass. Runs in the engine child."""
