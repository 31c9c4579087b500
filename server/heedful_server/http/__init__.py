"""HTTP port: health, readiness and metrics. Runs in the server process on the event loop."""
