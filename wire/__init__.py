"""HTTP/1.1 on the wire: clients on one side, Ollama on the other."""
