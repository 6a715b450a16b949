"""API keys: how they are written in the key file, how requests carry them, what they may do."""
