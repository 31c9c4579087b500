"""The tasks of an evaluation, one a file: each asks both policies and returns its section."""
