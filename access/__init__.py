"""API keys: their form in requests and in the key file, and what each may do."""
