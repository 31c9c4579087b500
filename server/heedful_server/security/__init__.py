"""Who may do what: keys, scopes of methods, certificates."""
