"""Documents and concept banks to instruction rows and preference pairs, by constrained generation or by rule."""
