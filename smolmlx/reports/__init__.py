"""What a run shows to people: one HTML file, charts for a README, a model card."""
