"""Which policy version answers: the registry as the server sees it, and what is loaded."""
