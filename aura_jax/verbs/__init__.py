"""The verbs of the command line: what each takes, and what it calls. Nothing heavy is imported before one runs."""
