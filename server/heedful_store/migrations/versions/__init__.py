"""One module per step of the schema, each with its way back."""
