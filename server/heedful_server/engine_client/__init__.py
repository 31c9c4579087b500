"""The server side of the engine: starts, supervises and talks to the child. Imports no torch."""
