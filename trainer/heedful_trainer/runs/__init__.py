"""Refresh runs: leased from the store, worked on stage by stage, resumed after a kill."""
