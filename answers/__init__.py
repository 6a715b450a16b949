"""What is asked of a model, and how its answers are shared and kept."""
