"""The reward model: trained from scratch in every run, with its report."""
