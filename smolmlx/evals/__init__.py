"""What a model's outputs are worth: exact metrics, the controls beside them, and how sure the difference is."""
