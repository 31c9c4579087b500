"""Version 1 of the contract: inference, feedback and models services (generated code)."""
