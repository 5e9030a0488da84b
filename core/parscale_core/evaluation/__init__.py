"""How good models are on held-out text, on tasks and on programming problems."""
