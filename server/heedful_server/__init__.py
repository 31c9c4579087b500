"""The heedful server process and its engine child."""
